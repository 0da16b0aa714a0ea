"""Puts single linears of a checkpoint back to float, to see how much of the loss each of them causes.

A method may have folded scales of a linear into its neighbours. The float weight is put back with the same scales, as far as
they can be recovered (`folded_scales`). Activations that a checkpoint rounds stay rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantline.toolchains.workers.reference.divergence import kl_divergence
from quantline.toolchains.workers.reference.folded_scales import folded_scales
from quantline.toolchains.workers.reference.scoring import Windows, log_probabilities
from quantline.toolchains.workers.reference.skeleton import REST
from quantline.toolchains.workers.reference.streaming import Batch, StreamedModel

if TYPE_CHECKING:
    from torch import Tensor


class Restoring:
    """Scores windows with the checkpoint as it is, and once more for each linear that is put back.

    Up to its layer a linear makes no difference, so its batches branch off there from those of the checkpoint as it is.
    Layers that share a weight all get the float one. A linear outside the layers makes one more pass.
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
        self._homes: dict[str, dict[str, str]] = {}
        for name in names:
            homes, floats = (model.skeleton.homes(f"{name}.weight") for model in (own, base))
            self._homes[name] = homes if homes.keys() == floats.keys() else {}
        self._notes = dict.fromkeys(
            names, "the model holds it in a stacked or fused tensor, so it cannot be put back alone"
        )
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
        for name, homes in self._homes.items():
            if REST in homes or (name not in self._branches and part not in homes):
                continue
            branch = self._branches.setdefault(name, [batch.copy() for batch in before])
            with self._float(name, part) if part in homes else nullcontext():
                for batch in branch:
                    self._own.advance(batch)

    def finish(self) -> None:
        """Compute the logits and their scores."""
        rows: dict[str, Sequence[Batch]] = {"": [one.own for one in self._windows], **self._branches}
        for name, homes in self._homes.items():
            if REST in homes:  # such as a projection before the first layer: it changes everything behind it
                rows[name] = [Batch(one.own.ids) for one in self._windows]
                with self._float(name, REST):
                    self._own.to_the_head(rows[name], lambda *_step: None)
            elif self._own.head in homes:
                rows.setdefault(name, rows[""])
        for number, one in enumerate(self._windows):
            assert one.base is not None, "every window is compared with the float model"
            floats = self._base.logits(one.base)
            for row, name in enumerate(["", *self._homes]):
                if name in rows:
                    self._keep(row, one, floats, name, rows[name][number])
        for name in rows:
            self._notes.pop(name, None)

    def _keep(self, row: int, one: Windows, floats: Tensor, name: str, batch: Batch) -> None:
        part = next((part for part in (REST, self._own.head) if part in self._homes.get(name, {})), None)
        with nullcontext() if part is None else self._float(name, part):
            logits = self._own.logits(batch)
        self._logprobs[row, one.scored] = log_probabilities(logits, one.targets)
        self._kl[row, one.scored] = kl_divergence(floats, logits).float().cpu().numpy()

    def result(self) -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float32]]]:
        """What was found.

        Returns:
            A row for each linear: `name`, `tensor` (its row in the tensors, None if it could not be put back) and `note`;
            and the tensors `logprobs` and `kl`, float32 (1 + linears put back, tokens), the unchanged checkpoint first.
        """
        rows: list[dict[str, Any]] = []
        kept = [0]
        for row, name in enumerate(self._homes, start=1):
            note = self._notes.get(name, "")
            rows.append({"name": name, "tensor": None if note else len(kept), "note": note})
            kept += [] if note else [row]
        return rows, {"logprobs": self._logprobs[kept], "kl": self._kl[kept]}

    def _float(self, name: str, part: str) -> AbstractContextManager[None]:
        """Inside the context, the linear is float in a part."""
        own, base = self._own.skeleton, self._base.skeleton
        for skeleton in (own, base) if part != REST else ():
            skeleton.fill(part)
        weight = base.parameter(base.homes(f"{name}.weight")[part])
        return restored(own.parameter(self._homes[name][part]), weight, folded=self._folded)


@contextmanager
def restored(quantized: Tensor, weight: Tensor, *, folded: bool) -> Iterator[None]:
    """Inside the block, a linear's weight is the float one, with the scales that were folded into it."""
    import torch

    original = quantized.detach().clone()
    if folded:
        rows, columns = (torch.from_numpy(part) for part in folded_scales(original.cpu().numpy(), weight.cpu().numpy()))
        weight = weight * rows.to(weight.device)[:, None] * columns.to(weight.device)
    quantized.copy_(weight)
    try:
        yield
    finally:
        quantized.copy_(original)
