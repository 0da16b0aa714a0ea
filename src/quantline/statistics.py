"""Intervals for the difference between two models that were scored on the same documents.

The bootstrap resamples whole documents, since the tokens of one are not independent of each other, and pairs the two
models, since most of a document's difficulty is the same for both (Efron & Tibshirani, "An Introduction to the
Bootstrap", 1993, chapters 8 and 13; Koehn, "Statistical significance tests for machine translation evaluation", 2004).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantline.errors import UserError

# Drawn document numbers held at a time: bounds the memory, whatever the number of documents.
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
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `sum(values) / sum(weights)` over resampled documents, see `paired_bootstrap`."""
    return paired_bootstrap(values, np.zeros_like(values), weights, seed=seed, resamples=resamples, level=level)


def paired_bootstrap(
    values: NDArray[np.float64],
    baseline: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `sum(values - baseline) / sum(weights)` over resampled documents.

    A ratio of sums, not a mean of ratios: every token counts the same, and a resample with longer documents has a
    larger denominator as well. The same arguments give the same interval on any machine and number of threads.

    Args:
        values, baseline: float64 (documents,), totals of a document under either model.
        weights: float64 (documents,), what the totals are over (tokens); positive.
        seed: of the resampling.
        resamples: number of resamples.
        level: probability that the interval is meant to cover, in (0, 1).

    Raises:
        UserError: fewer than two documents, other shapes, weights that are not positive, a level or a number of
            resamples out of range.
    """
    documents = len(weights)
    if values.shape != (documents,) or baseline.shape != (documents,):
        raise UserError(f"bootstrap: {values.shape[0]}, {baseline.shape[0]} and {documents} documents cannot be paired")
    if documents < 2:
        raise UserError(f"bootstrap: {documents} document has no spread; evaluate two or more, better fifty")
    if not (weights > 0).all():
        raise UserError("bootstrap: a document without weight; leave it out")
    if not 0 < level < 1 or resamples < 1:
        raise UserError(f"bootstrap: level={level}, resamples={resamples}: give 0 < level < 1 and resamples >= 1")
    differences = values - baseline
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    step = max(1, _DRAWS // documents)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, documents, size=(rows, documents))
        # Sums, not matrix products: their order, and so the last bit, does not depend on the number of threads.
        ratios[start : start + rows] = differences[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(math.fsum(differences) / math.fsum(weights), float(low), float(high))
