from __future__ import annotations

import numpy as np
import pytest

from quantline.errors import UserError
from quantline.statistics import paired_bootstrap

WEIGHTS = np.array([100.0, 200.0, 300.0])


def corpus(
    shift: float, noise: float, documents: int = 200, seed: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses whose documents differ far more from each other than the two models do."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(50, 500, documents).astype(np.float64)
    baseline = weights * generator.normal(3.0, 1.0, documents)
    return baseline + weights * generator.normal(shift, noise, documents), baseline, weights


def test_equal_values_give_exactly_zero() -> None:
    values = np.array([1.5, 2.5, 3.5])
    interval = paired_bootstrap(values, values, WEIGHTS, seed=0)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_the_estimate_weighs_tokens_not_documents() -> None:
    values, baseline = np.array([10.0, 0.0, 0.0]), np.zeros(3)
    assert paired_bootstrap(values, baseline, WEIGHTS, seed=0).estimate == 10.0 / 600.0


def test_a_constant_shift_has_no_width_whatever_the_documents_weigh() -> None:
    interval = paired_bootstrap(0.25 * WEIGHTS, np.zeros(3), WEIGHTS, seed=0)
    assert (interval.estimate, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_two_documents_give_the_quantiles_of_three_outcomes() -> None:
    # Two draws of two: both the first (1/4), mixed (1/2), both the second (1/4).
    interval = paired_bootstrap(np.array([0.0, 2.0]), np.zeros(2), np.ones(2), seed=0, level=0.9)
    assert (interval.low, interval.estimate, interval.high) == (0.0, 1.0, 2.0)
    narrow = paired_bootstrap(np.array([0.0, 2.0]), np.zeros(2), np.ones(2), seed=0, level=0.2)
    assert (narrow.low, narrow.high) == (1.0, 1.0)


def test_pairing_finds_a_shift_far_smaller_than_the_spread_of_documents() -> None:
    interval = paired_bootstrap(*corpus(shift=0.01, noise=0.02), seed=0)
    assert 0 < interval.low < 0.01 < interval.high < 0.02


def test_the_interval_covers_the_true_shift_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        values, baseline, weights = corpus(0.05, 0.1, documents=60, seed=seed)
        interval = paired_bootstrap(values, baseline, weights, seed=seed, resamples=400, level=0.9)
        covered += interval.low <= 0.05 <= interval.high
    assert 0.82 <= covered / 200 <= 0.95


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    data = corpus(0.05, 0.1)
    first = paired_bootstrap(*data, seed=3, resamples=500)
    assert first == paired_bootstrap(*data, seed=3, resamples=500)
    assert first != paired_bootstrap(*data, seed=4, resamples=500)


def test_drawing_in_blocks_gives_what_drawing_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(0.05, 0.1, documents=8)
    whole = paired_bootstrap(*data, seed=3, resamples=100)
    monkeypatch.setattr("quantline.statistics._DRAWS", 64)
    assert paired_bootstrap(*data, seed=3, resamples=100) == whole


@pytest.mark.parametrize(
    ("values", "weights", "options", "fact"),
    [
        ([1.0], [1.0], {}, "1 document has no spread"),
        ([1.0, 2.0], [1.0], {}, "cannot be paired"),
        ([1.0, 2.0], [1.0, 0.0], {}, "without weight"),
        ([1.0, 2.0], [1.0, 1.0], {"level": 1.0}, "level=1.0"),
        ([1.0, 2.0], [1.0, 1.0], {"resamples": 0}, "resamples=0"),
    ],
)
def test_what_has_no_interval_is_refused(values: list[float], weights: list[float], options: dict, fact: str) -> None:
    array = np.array(values)
    with pytest.raises(UserError, match=fact):
        paired_bootstrap(array, array, np.array(weights), seed=0, **options)
