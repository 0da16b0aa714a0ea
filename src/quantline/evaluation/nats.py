"""Convert mean losses in nats per token to perplexities. Infinite beyond the range of a float; NaN stays NaN."""

from __future__ import annotations

import math

_LARGEST = 700.0  # e**709.8 is the largest float


def exp(nats: float) -> float:
    """The perplexity of a mean loss."""
    return math.inf if nats > _LARGEST else math.exp(nats)


def growth(difference: float) -> float:
    """The relative growth of perplexity for a difference of mean losses: exp(difference) - 1."""
    return math.inf if difference > _LARGEST else math.expm1(difference)
