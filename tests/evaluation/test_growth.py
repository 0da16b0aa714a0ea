from __future__ import annotations

import math

from quantline.evaluation.growth import growth_of, perplexity_of


def test_a_difference_of_losses_is_the_growth_of_the_perplexity():
    assert math.isclose(growth_of(math.log(1.03)), 0.03)
    assert math.isclose(growth_of(1e-12), 1e-12)  # exp(x) - 1 would lose it
    assert growth_of(-800) == -1
    assert math.isclose(perplexity_of(math.log(15)), 15)


def test_what_no_float_holds_is_infinite():
    assert growth_of(1000) == perplexity_of(1000) == math.inf


def test_what_is_no_number_stays_none():
    assert math.isnan(growth_of(math.nan))
    assert math.isnan(perplexity_of(math.nan))
