"""From mean losses to perplexities and their growth, infinite instead of an overflow. Standard library only.

Everything that shows or judges a difference of losses uses this: evaluation, report, lineage and the gates of promotion.
"""

from __future__ import annotations

import math

# exp(709.8) is the largest float64.
_LARGEST_EXPONENT = 700


def perplexity_of(nll: float) -> float:
    """`exp(nll)` of a mean negative log-likelihood in nats, or of a difference of two: the ratio of perplexities."""
    return math.inf if nll > _LARGEST_EXPONENT else math.exp(nll)


def growth_of(nll_difference: float) -> float:
    """`exp(difference) - 1`: by which share the perplexity is larger; 0.03 means 3 %."""
    return math.inf if nll_difference > _LARGEST_EXPONENT else math.expm1(nll_difference)
