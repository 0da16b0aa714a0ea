from __future__ import annotations

import numpy as np
import pytest
from sections import bootstrap

from quantline.core.errors import UserError
from quantline.evaluation.bootstrap import caution, paired_bootstrap, paired_recovery

HOW = bootstrap()
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
    interval = paired_bootstrap(values, values, WEIGHTS, HOW)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_the_estimate_weighs_tokens_not_documents() -> None:
    values, baseline = np.array([10.0, 0.0, 0.0]), np.zeros(3)
    assert paired_bootstrap(values, baseline, WEIGHTS, HOW).estimate == 10.0 / 600.0


def test_a_constant_shift_has_no_width_whatever_the_documents_weigh() -> None:
    interval = paired_bootstrap(0.25 * WEIGHTS, np.zeros(3), WEIGHTS, HOW)
    assert (interval.estimate, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_two_documents_give_the_quantiles_of_three_outcomes() -> None:
    # Two draws of two: both the first (1/4), mixed (1/2), both the second (1/4).
    interval = paired_bootstrap(np.array([0.0, 2.0]), np.zeros(2), np.ones(2), bootstrap(seed=0, level=0.9))
    assert (interval.low, interval.estimate, interval.high) == (0.0, 1.0, 2.0)
    narrow = paired_bootstrap(np.array([0.0, 2.0]), np.zeros(2), np.ones(2), bootstrap(level=0.51))
    assert (narrow.low, narrow.high) == (1.0, 1.0)


def test_pairing_finds_a_shift_far_smaller_than_the_spread_of_documents() -> None:
    interval = paired_bootstrap(*corpus(shift=0.01, noise=0.02), HOW)
    assert 0 < interval.low < 0.01 < interval.high < 0.02


def test_the_interval_covers_the_true_shift_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        values, baseline, weights = corpus(0.05, 0.1, documents=60, seed=seed)
        interval = paired_bootstrap(values, baseline, weights, bootstrap(seed=seed, resamples=400, level=0.9))
        covered += interval.low <= 0.05 <= interval.high
    assert 0.82 <= covered / 200 <= 0.95


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    data = corpus(0.05, 0.1)
    first = paired_bootstrap(*data, bootstrap(seed=3, resamples=500))
    assert first == paired_bootstrap(*data, bootstrap(seed=3, resamples=500))
    assert first != paired_bootstrap(*data, bootstrap(seed=4, resamples=500))


def test_drawing_in_blocks_gives_what_drawing_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(0.05, 0.1, documents=8)
    whole = paired_bootstrap(*data, bootstrap(seed=3, resamples=100))
    monkeypatch.setattr("quantline.evaluation.bootstrap._DRAWS", 64)
    assert paired_bootstrap(*data, bootstrap(seed=3, resamples=100)) == whole


@pytest.mark.parametrize(
    ("values", "weights", "fact"),
    [
        ([1.0], [1.0], "1 document has no spread"),
        ([1.0, 2.0], [1.0], "cannot be paired"),
        ([1.0, 2.0], [1.0, 0.0], "is not positive"),
    ],
)
def test_what_has_no_interval_is_refused(values: list[float], weights: list[float], fact: str) -> None:
    array = np.array(values)
    with pytest.raises(UserError, match=fact):
        paired_bootstrap(array, array, np.array(weights), HOW)


def test_recovery_of_itself_is_one_without_width() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0] * 10)
    recovery = paired_recovery(values, values, aggregation="mean", higher_is_better=True, how=HOW)
    assert (recovery.estimate, recovery.low, recovery.high) == (1.0, 1.0, 1.0)


def test_recovery_is_below_one_for_the_worse_model_whichever_way_the_score_goes() -> None:
    right, fewer = np.array([1.0] * 30 + [0.0] * 10), np.array([1.0] * 15 + [0.0] * 25)
    up = paired_recovery(fewer, right, aggregation="mean", higher_is_better=True, how=HOW)
    down = paired_recovery(right, fewer, aggregation="mean", higher_is_better=False, how=HOW)
    assert up.estimate == down.estimate == 0.5
    nats = paired_recovery(fewer - 2.0, right - 2.0, aggregation="perplexity", higher_is_better=False, how=HOW)
    assert nats.estimate == pytest.approx(np.exp(-15 / 40))
    for recovery in (up, down, nats):
        assert recovery.low is not None
        assert recovery.high is not None
        assert recovery.low < recovery.estimate < recovery.high < 1.0


def test_pairing_makes_the_interval_of_a_recovery_narrower() -> None:
    generator = np.random.default_rng(0)
    baseline = (generator.random(200) < 0.6).astype(float)
    same = baseline.copy()
    same[np.flatnonzero(baseline)[:6]] = 0.0
    shuffled = generator.permutation(same)
    paired, unpaired = (
        paired_recovery(each, baseline, aggregation="mean", higher_is_better=True, how=HOW) for each in (same, shuffled)
    )
    assert paired.estimate == unpaired.estimate
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_a_baseline_that_scored_nothing_has_no_recovery() -> None:
    recovery = paired_recovery(np.ones(4), np.zeros(4), aggregation="mean", higher_is_better=True, how=HOW)
    assert (recovery.estimate, recovery.low, recovery.high) == (None, None, None)


def test_recovery_of_other_items_or_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be paired"):
        paired_recovery(np.ones(3), np.ones(2), aggregation="mean", higher_is_better=True, how=HOW)
    with pytest.raises(UserError, match="has no spread"):
        paired_recovery(np.ones(1), np.ones(1), aggregation="mean", higher_is_better=True, how=HOW)


def test_intervals_on_few_documents_come_with_a_caution():
    assert caution(None) is None
    assert caution(50) is None
    assert "the intervals rest on 49 documents only" in caution(49)
