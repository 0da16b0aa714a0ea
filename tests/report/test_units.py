from __future__ import annotations

import math

import pytest

from quantline.core.text import decimal_size, digits, listed
from quantline.report.units import Column, written


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "count", "not measured"), (True, "text", "yes"), (False, "yes", "no"), ("a" * 20, "hash", "a" * 12 + "…"),
        (1234567, "count", "1 234 567"), (1_340_000_000, "bytes", "1.34 GB"), (999, "bytes", "999 B"),
        (0.0512, "growth", "+0.051 %"), (-12.34, "growth", "-12.3 %"), (250.4, "growth", "+250 %"),
        (0.9876, "share", "98.8 %"), (0.9999, "share", "99.99 %"), (1, "share", "100.0 %"), (12.345, "percent", "12.3 %"),
        (3.14159, "seconds", "3.14 s"), (0.5, "ms", "0.500 ms"), (1.5, "ratio", "1.50x"), (0.00123, "nats", "0.00123"),
        (7.0, "plain", "7"), (2.5, "plain", "2.5"), (0.02462, "plain", "0.02462"),
        (math.inf, "ratio", "unbounded"), (-math.inf, "ratio", "-unbounded"), (math.nan, "ratio", "none"),
    ],
)  # fmt: skip
def test_a_value_is_written_with_its_unit(value, kind, text):
    assert written(value, kind) == text


def test_an_interval_stands_behind_its_value_with_the_same_digits():
    column = Column("x", "x", "growth", "low", "high")
    assert column.text({"x": 1.234, "low": -0.5, "high": 20.0}) == "+1.2 % [-0.5, +20.0]"
    assert column.text({"x": 1.234, "low": None, "high": 20.0}) == "+1.23 %"
    assert (
        Column("x", "x", "bytes", "low", "high").text({"x": 2e9, "low": 1e9, "high": 3e9})
        == "2.00 GB [1.00 GB, 3.00 GB]"
    )


def test_a_missing_value_of_the_baseline_says_baseline():
    assert Column("x", "x").text({"baseline": True}) == "baseline"
    assert Column("x", "x", missing="none").text({"baseline": True}) == "none"


def test_only_numbers_are_set_to_the_right():
    assert Column("x", "x", "bytes").numeric
    assert not Column("x", "x", "code").numeric


def test_sizes_digits_and_lists():
    assert [decimal_size(value) for value in (0, 1000, 2_500_000, 10**12)] == ["0 B", "1.00 kB", "2.50 MB", "1.00 TB"]
    assert [digits(value, 3) for value in (0, 0.00001234, 12345678, 99.99, 0.1)] == [
        "0",
        "1.23e-05",
        "1.23e+07",
        "100.0",
        "0.100",
    ]
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
