from __future__ import annotations

import math

import pytest

from quantline.evaluation import nats


@pytest.mark.parametrize("value", [-1000.0, -1.0, 0.0, 1e-12, 2.5, 700.0])
def test_within_the_range_of_a_float_it_is_the_exponential(value):
    assert nats.exp(value) == math.exp(value)
    assert nats.growth(value) == math.expm1(value)


@pytest.mark.parametrize("value", [700.1, 1e9, math.inf])
def test_beyond_it_is_infinite(value):
    assert nats.exp(value) == nats.growth(value) == math.inf


def test_nan_stays_nan():
    assert math.isnan(nats.exp(math.nan))
    assert math.isnan(nats.growth(math.nan))
