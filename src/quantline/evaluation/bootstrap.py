"""Intervals for the difference between two models that were scored on the same documents.

The bootstrap resamples whole documents, since the tokens of a document are not independent. It pairs the two models,
since most of a document's difficulty is the same for both (Efron & Tibshirani, "An Introduction to the
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

# With fewer documents a percentile interval is often too narrow, since few resamples of them are different.
ENOUGH_DOCUMENTS = 50
# The most drawn item numbers in memory at a time, whatever the number of documents.
_DRAWS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


def caution(documents: float | None) -> str | None:
    """A sentence if an interval rests on few documents; None if on enough, or if their number is not known."""
    if documents is None or documents >= ENOUGH_DOCUMENTS:
        return None
    return (
        f"the intervals rest on {documents:.0f} documents only, with which they are often too narrow: evaluate at least "
        f"{ENOUGH_DOCUMENTS} (evaluate.max_tokens, evaluate.max_documents, or more text in evaluate.path)"
    )


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

    A ratio of sums, not a mean of ratios: every token counts the same, and a resample with longer documents also has
    a larger denominator. The same arguments give the same interval on any machine and number of threads.

    Args:
        values, baseline: float64 (documents,), totals of each document under either model.
        weights: float64 (documents,), the number of tokens in each total; positive.
        how: number and seed of the resamples, and the interval's level.

    Raises:
        UserError: fewer than two documents, different shapes, or weights that are not positive.
    """
    documents = len(weights)
    if values.shape != (documents,) or baseline.shape != (documents,):
        raise UserError(f"bootstrap: {values.shape[0]}, {baseline.shape[0]} and {documents} documents cannot be paired")
    if documents < 2:
        raise UserError(
            f"bootstrap: {documents} document has no spread; evaluate two at least, better {ENOUGH_DOCUMENTS}"
        )
    if not (weights > 0).all():
        raise UserError("bootstrap: the weight of a document is not positive; leave it out")
    differences = values - baseline

    def ratio(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        # Sums, not matrix products: the order of sums, and so the last bit, does not depend on the number of threads.
        ratios: NDArray[np.float64] = differences[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
        return ratios

    ratios = _resampled(ratio, documents, how.resamples, how.seed)
    tail = (1 - how.level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(math.fsum(differences) / math.fsum(weights), float(low), float(high))


def _resampled(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], items: int, resamples: int, seed: int
) -> NDArray[np.float64]:
    """A statistic of `resamples` samples of `items` items each, drawn with replacement.

    statistic: maps drawn item numbers, int64 (samples, items), to float64 (samples,).
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
    """A variant's score divided by the baseline's, with its interval; None if the baseline's score is zero."""

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
    """Percentile interval of the share of the baseline's score that a variant keeps, over resampled items.

    1 is the whole score, and less is always worse: the ratio is variant over baseline if a higher score is better, else
    baseline over variant.

    Args:
        values, baseline: float64 (items,), scores of the same items; log-likelihoods for `perplexity`.
        aggregation: how scores are aggregated: their mean, or exp(-mean).
        higher_is_better: of the aggregated score.
        how: see `paired_bootstrap`.

    Raises:
        UserError: fewer than two items, or different shapes.
    """
    if values.shape != baseline.shape:
        raise UserError(f"recovery: {len(values)} and {len(baseline)} items cannot be paired")
    if len(values) < 2:
        raise UserError(f"recovery: {len(values)} item has no spread; use at least two, better two hundred")

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
    # 0/0 is left out: both models scored zero in that resample. x/0 counts, as infinite: only the variant scored.
    low, high = np.quantile(ratios[~np.isnan(ratios)], [tail, 1 - tail], method="nearest")
    return Recovery(float(estimate), *(float(end) if math.isfinite(end) else None for end in (low, high)))
