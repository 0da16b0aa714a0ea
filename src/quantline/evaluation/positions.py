"""How much a variant loses by the number of tokens before the one that is predicted: does the loss grow with the context?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import BootstrapConfig
from quantline.data.windows import Windows
from quantline.evaluation import nats
from quantline.evaluation.bootstrap import paired_bootstrap
from quantline.evaluation.perplexity import document_sums

TABLE = "positions.csv"
COLUMNS = (
    "first", "last", "tokens", "documents", "perplexity", "float_perplexity", "nll_difference", "nll_low", "nll_high",
)  # fmt: skip
# The first range ends before this many tokens of context; each further one is twice as long.
_FIRST = 16


def by_position(
    windows: Windows, own: NDArray[Any], base: NDArray[Any], how: BootstrapConfig
) -> list[dict[str, float | int | None]]:
    """The loss in ranges of the context's length, see `COLUMNS`: first and last number of tokens before the predicted one.

    nll_difference is in nats per token, with its paired interval over the documents that reach the range; None with
    fewer than two of them.

    Args:
        own, base: float (tokens,), log-probabilities of the variant and of the float model, aligned with the windows.
    """
    lengths = np.diff(windows.offsets)
    place = np.arange(len(windows.input_ids)) - np.repeat(windows.offsets[:-1], lengths)
    rows: list[dict[str, float | int | None]] = []
    first, end = 1, _FIRST
    while first < int(lengths.max(initial=0)):
        inside = (place >= first) & (place < end)
        nll, tokens = document_sums(windows, -own, inside)
        floats, _ = document_sums(windows, -base, inside)
        reach = tokens > 0
        if reach.any():
            total = math.fsum(tokens)
            row: dict[str, float | int | None] = {
                "first": first, "last": min(end, int(lengths.max())) - 1, "tokens": int(total),
                "documents": int(reach.sum()), "perplexity": nats.exp(math.fsum(nll) / total),
                "float_perplexity": nats.exp(math.fsum(floats) / total),
                "nll_difference": math.fsum(nll - floats) / total, "nll_low": None, "nll_high": None,
            }  # fmt: skip
            if reach.sum() > 1:
                found = paired_bootstrap(nll[reach], floats[reach], tokens[reach], how)
                row.update(nll_low=found.low, nll_high=found.high)
            rows.append(row)
        first, end = end, 2 * end
    return rows
