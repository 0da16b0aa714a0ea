"""Puts single linears of a checkpoint back to float, to see how much of the loss each of them causes.

A method may have folded scales of a linear into its neighbours. The float weight is put back with the same scales, as far as
they can be recovered (`folded_scales`). Activations that a checkpoint rounds stay rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.reference.divergence import kl_divergence
from quantline.toolchains.workers.reference.folded_scales import folded_scales
from quantline.toolchains.workers.reference.scoring import Windows, log_probabilities
from quantline.toolchains.workers.reference.streaming import Batch, StreamedModel

if TYPE_CHECKING:
    from torch import Tensor


class Restoring:
    """Scores windows with the checkpoint as it is, and once more for each linear that is put back.

    Up to its layer a linear makes no difference, so its batches branch off there from those of the checkpoint as it is.
    """

    def __init__(
        self,
        own: StreamedModel,
        base: StreamedModel,
        windows: Sequence[Windows],
        tokens: int,
        names: Sequence[str],
        *,
        folded: bool,
    ) -> None:
        """Set it up.

        Args:
            own, base: the checkpoint's and the float model, which go through their parts side by side.
            windows: batches of windows, compared with the float model.
            tokens: the number of tokens in all windows.
            names: the linears.
            folded: whether scales were folded into neighbours.
        """
        self._own, self._base, self._windows, self._folded = own, base, windows, folded
        self._notes = dict.fromkeys(names, "it is outside the layers, so it cannot be put back alone")
        self._branches: dict[str, list[Batch]] = {}
        shape = (1 + len(names), tokens)
        self._logprobs, self._kl = (np.full(shape, np.nan, np.float32) for _ in range(2))

    def advance(self, part: str) -> None:
        """Compute a part for the windows, in both models and in every branch."""
        before = [one.own.copy() for one in self._windows]
        for one in self._windows:
            self._own.advance(one.own)
            if one.base is not None:
                self._base.advance(one.base)
        for branch in self._branches.values():
            for batch in branch:
                self._own.advance(batch)
        for name in self._in(part):
            branch = [batch.copy() for batch in before]
            if self._with_float(name, partial(_each, self._own.advance, branch)):
                self._branches[name] = branch

    def finish(self) -> None:
        """Compute the logits and their scores."""
        for number, one in enumerate(self._windows):
            assert one.base is not None, "every window is compared with the float model"
            floats = self._base.logits(one.base)
            self._keep(0, one, floats, one.own)
            for row, name in enumerate(self._notes, start=1):
                if name in self._branches:
                    self._keep(row, one, floats, self._branches[name][number])
                elif name in self._in(self._own.head):
                    self._with_float(name, partial(self._keep, row, one, floats, one.own))

    def result(self) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float32]]]:
        """What was found.

        Returns:
            A row for each linear: `name`, `tensor` (its row in the tensors, None if it could not be put back) and `note`;
            and the tensors `logprobs` and `kl`, float32 (1 + linears put back, tokens), the unchanged checkpoint first.
        """
        rows: list[dict[str, Any]] = []
        kept = [0]
        for row, (name, note) in enumerate(self._notes.items(), start=1):
            rows.append({"name": name, "tensor": None if note else len(kept), "note": note})
            kept += [] if note else [row]
        return rows, {"logprobs": self._logprobs[kept], "kl": self._kl[kept]}

    def _in(self, part: str) -> list[str]:
        return [name for name in self._notes if self._own.skeleton.part_of(name) == part]

    def _with_float(self, name: str, compute: Callable[[], None]) -> bool:
        """Compute with a float linear; what prevents that becomes its note."""
        try:
            with restored(self._own.model, self._base.model, name, self._folded):
                compute()
        except JobError as error:
            self._notes[name] = str(error)
            return False
        self._notes[name] = ""
        return True

    def _keep(self, row: int, one: Windows, floats: Tensor, batch: Batch) -> None:
        logits = self._own.logits(batch)
        self._logprobs[row, one.scored] = log_probabilities(logits, one.targets)
        self._kl[row, one.scored] = kl_divergence(floats, logits).float().cpu().numpy()


def _each(compute: Callable[[Batch], Any], batches: Sequence[Batch]) -> None:
    for batch in batches:
        compute(batch)


@contextmanager
def restored(model: Any, floats: Any, name: str, folded: bool) -> Iterator[None]:
    """Inside the block, a linear of `model` has the float model's weight; both have the weights of its part.

    Raises:
        JobError: the linear has no separate weight in one of the models.
    """
    import torch

    quantized, weight = (dict(one.named_parameters()).get(f"{name}.weight") for one in (model, floats))
    if quantized is None or weight is None or quantized.shape != weight.shape:
        raise JobError("the model holds it in a stacked or fused tensor, so it cannot be put back alone")
    original = quantized.detach().clone()
    if folded:
        rows, columns = (torch.from_numpy(part) for part in folded_scales(original.cpu().numpy(), weight.cpu().numpy()))
        weight = weight * rows.to(weight.device)[:, None] * columns.to(weight.device)
    quantized.copy_(weight)
    try:
        yield
    finally:
        quantized.copy_(original)
