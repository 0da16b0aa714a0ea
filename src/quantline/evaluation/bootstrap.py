"""Intervals for the difference between two models that were scored on the same documents.

The bootstrap resamples whole documents, since the tokens of one are not independent of each other, and pairs the two
models, since most of a document's difficulty is the same for both (Efron & Tibshirani, "An Introduction to the
Bootstrap", 1993, chapters 8 and 13; Koehn, "Statistical significance tests for machine translation evaluation", 2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import BootstrapConfig
from quantline.core.errors import UserError

# Drawn item numbers held at a time. It bounds the memory, whatever the number of documents.
_DRAWS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


def bootstrap(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    how: BootstrapConfig,
) -> Interval:
    """Percentile interval of `sum(values) / sum(weights)` over resampled documents, see `paired_bootstrap`."""
    return paired_bootstrap(values, np.zeros_like(values), weights, how)


def paired_bootstrap(
    values: NDArray[np.float64],
    baseline: NDArray[np.float64],
    weights: NDArray[np.float64],
    how: BootstrapConfig,
) -> Interval:
    """Percentile interval of `sum(values - baseline) / sum(weights)` over resampled documents.

    A ratio of sums, not a mean of ratios: every token counts the same, and a resample with longer documents has a
    larger denominator as well. The same arguments give the same interval on any machine and number of threads.

    Args:
        values, baseline: float64 (documents,), totals of a document under either model.
        weights: float64 (documents,), what the totals are over (tokens); positive.
        how: number and seed of the resamples, and the interval's level.

    Raises:
        UserError: fewer than two documents, other shapes, or weights that are not positive.
    """
    documents = len(weights)
    if values.shape != (documents,) or baseline.shape != (documents,):
        raise UserError(f"bootstrap: {values.shape[0]}, {baseline.shape[0]} and {documents} documents cannot be paired")
    if documents < 2:
        raise UserError(f"bootstrap: {documents} document has no spread; evaluate two or more, better fifty")
    if not (weights > 0).all():
        raise UserError("bootstrap: a document without weight; leave it out")
    differences = values - baseline

    def ratio(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        # Sums, not matrix products: their order, and so the last bit, does not depend on the number of threads.
        ratios: NDArray[np.float64] = differences[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
        return ratios

    ratios = _resampled(ratio, documents, how.resamples, how.seed)
    tail = (1 - how.level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(math.fsum(differences) / math.fsum(weights), float(low), float(high))


def _resampled(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], items: int, resamples: int, seed: int
) -> NDArray[np.float64]:
    """A statistic of `resamples` samples of as many items, drawn with replacement.

    statistic: from drawn item numbers, int64 (samples, items), to float64 (samples,).
    """
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    step = max(1, _DRAWS // items)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        found[start : start + rows] = statistic(generator.integers(0, items, size=(rows, items)))
    return found


@dataclass(frozen=True)
class Recovery:
    """A variant's score over the baseline's and its interval; None where the baseline scored nothing to be divided by."""

    estimate: float | None
    low: float | None
    high: float | None


def paired_recovery(
    values: NDArray[np.float64],
    baseline: NDArray[np.float64],
    *,
    aggregation: Literal["mean", "perplexity"],
    higher_is_better: bool,
    how: BootstrapConfig,
) -> Recovery:
    """Percentile interval of how much of the baseline's score a variant keeps, over resampled items.

    1 is all of it, and less is worse whichever way the score goes: the ratio is variant over baseline where higher is
    better, and baseline over variant where it is not.

    Args:
        values, baseline: float64 (items,), scores of the same items; for `perplexity` their log-likelihoods.
        aggregation: how scores become one: their mean, or exp(-mean).
        higher_is_better: of the aggregated score.
        how: see `paired_bootstrap`.

    Raises:
        UserError: fewer than two items, or other shapes.
    """
    if values.shape != baseline.shape:
        raise UserError(f"recovery: {len(values)} and {len(baseline)} items cannot be paired")
    if len(values) < 2:
        raise UserError(f"recovery: {len(values)} item has no spread; ask two or more, better two hundred")

    def ratio(own: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        if aggregation == "perplexity":
            own, other = np.exp(-own), np.exp(-other)
        with np.errstate(divide="ignore", invalid="ignore"):
            return own / other if higher_is_better else other / own

    ratios = _resampled(
        lambda drawn: ratio(values[drawn].mean(axis=1), baseline[drawn].mean(axis=1)),
        len(values),
        how.resamples,
        how.seed,
    )
    (estimate,) = ratio(values.mean(keepdims=True), baseline.mean(keepdims=True))
    if not math.isfinite(estimate):
        return Recovery(None, None, None)
    tail = (1 - how.level) / 2
    # 0/0 is left out: both models scored zero in that resample. The variant alone above zero is infinite, and counts.
    low, high = np.quantile(ratios[~np.isnan(ratios)], [tail, 1 - tail], method="nearest")
    return Recovery(float(estimate), *(float(end) if math.isfinite(end) else None for end in (low, high)))
