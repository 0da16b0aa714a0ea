"""The Kullback-Leibler divergence of next-token distributions, and how far two models' hidden states are apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantline.toolchains.protocol import JobError

if TYPE_CHECKING:
    from torch import Tensor

# Values in a block of float64 probabilities, 32 MiB.
_BLOCK = 2**22


def kl_divergence(floats: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(floats) || softmax(logits)) of each row, float64 (rows,) in nats; equal rows give exactly 0.

    Computed in float64, a few rows at a time.

    Args:
        floats, logits: float32 (rows, vocabulary), of the float model and of the checkpoint.

    Raises:
        JobError: the vocabularies differ in size; NaN.
    """
    import torch

    if floats.shape != logits.shape:
        raise JobError(
            f"the float model has {floats.shape[1]} logits per token and the checkpoint {logits.shape[1]}: their "
            "distributions cannot be compared; set evaluate.divergence.tokens=0"
        )
    divergence = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    rows = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        expected = floats[block].double().log_softmax(dim=1)
        terms = expected.exp() * (expected - logits[block].double().log_softmax(dim=1))
        # Tokens of probability 0 in the float model add nothing. Rounding can give tiny negative sums.
        divergence[block] = terms.masked_fill(expected == -math.inf, 0.0).sum(dim=1).clamp(min=0)
    if divergence.isnan().any():
        raise JobError("the logits of the float model or of the checkpoint are NaN; they overflow in float32")
    return divergence


class Apart:
    """How far a model's hidden states are from the float model's: ||H' - H|| / ||H||, summed up over batches."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.energies: list[float] = []

    def add(self, floats: Tensor, states: Tensor) -> None:
        """Add float32 (rows, length, width) of both models."""
        self.errors.append(float((states - floats).double().square().sum()))
        self.energies.append(float(floats.double().square().sum()))

    @property
    def relative(self) -> float | None:
        """The relative difference; None if nothing was added. The order of the batches does not change it."""
        energy = math.fsum(self.energies)
        return math.sqrt(math.fsum(self.errors) / energy) if energy else None
