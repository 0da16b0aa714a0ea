"""How much a variant loses on each group of documents, and on the worst one: a mean hides a domain that suffers.

A document's group is the part of its id before the first slash: `python/tutorial` is of the group `python`. The intervals
hold for all groups together (Bonferroni), since the worst one is looked for among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from quantline.config.evaluate import BootstrapConfig
from quantline.evaluation import nats
from quantline.evaluation.bootstrap import paired_bootstrap
from quantline.evaluation.perplexity import DocumentScore

TABLE = "groups.csv"
COLUMNS = (
    "group", "documents", "tokens", "perplexity", "float_perplexity", "nll_difference", "nll_low", "nll_high",
)  # fmt: skip
# A group of fewer documents has no interval that means anything, and is never the worst one.
_FEWEST = 5
Row = dict[str, Any]


def by_group(own: Sequence[DocumentScore], base: Sequence[DocumentScore], how: BootstrapConfig) -> list[Row]:
    """The loss in each group, see `COLUMNS`, the worst first; empty without at least two groups.

    nll_difference is in nats per token, with its paired interval over documents; the ends are None with fewer than
    five documents.

    Args:
        own, base: the losses of the variant and of the float model, of the same documents in the same order.
        how: number and seed of the resamples, and the level that all intervals have together.
    """
    if not all("/" in score.id for score in own):
        return []
    names = [score.id.partition("/")[0] for score in own]
    groups = sorted(set(names))
    if len(groups) < 2:
        return []
    judged = sum(names.count(group) >= _FEWEST for group in groups)
    together = how.model_copy(update={"level": 1 - (1 - how.level) / max(1, judged)})
    sums = [np.array([score.nll_sum for score in scores]) for scores in (own, base)]
    tokens = np.array([score.tokens for score in own], dtype=np.float64)
    rows = [_row(group, np.array([name == group for name in names]), sums, tokens, together) for group in groups]
    return sorted(rows, key=lambda row: (row["nll_low"] is None, -row["nll_difference"]))


def _row(
    group: str, inside: np.ndarray, sums: Sequence[np.ndarray], tokens: np.ndarray, how: BootstrapConfig
) -> Row:  # fmt: skip
    nll, floats, count = sums[0][inside], sums[1][inside], tokens[inside]
    total = math.fsum(count)
    row: Row = {
        "group": group, "documents": len(count), "tokens": int(total), "perplexity": nats.exp(math.fsum(nll) / total),
        "float_perplexity": nats.exp(math.fsum(floats) / total), "nll_difference": math.fsum(nll - floats) / total,
        "nll_low": None, "nll_high": None,
    }  # fmt: skip
    if len(count) >= _FEWEST:
        found = paired_bootstrap(nll, floats, count, how)
        row.update(nll_low=found.low, nll_high=found.high)
    return row


def worst(rows: Sequence[Row]) -> Row | None:
    """The group that loses most among those with an interval; None if there is none."""
    return next((row for row in rows if row["nll_low"] is not None), None)


def note(row: Row, high: float) -> str | None:
    """A sentence if the worst group loses more than the whole, by their intervals. high: the whole's upper end in nats."""
    if row["nll_low"] <= high:
        return None
    change, low, top = (100 * nats.growth(row[key]) for key in ("nll_difference", "nll_low", "nll_high"))
    return (
        f"the group {row['group']} loses more than the whole text: perplexity {change:+.2f} % [{low:+.2f}, {top:+.2f}] on "
        f"{row['documents']} documents"
    )
