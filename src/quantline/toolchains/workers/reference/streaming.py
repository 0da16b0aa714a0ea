"""Runs a model part by part over many batches, so that each part's weights are needed once and only while it computes.

The model's own forward pass is used, whatever its family passes to its layers. For each part and each batch it is run up to
that part: the parts before it are not computed again. The last of them returns its stored output, and the others return
NaN, since only the last one's output is read by what follows. Where a family also reads the embeddings later (Gemma 3n,
Zamba), the NaN shows, and the embeddings are computed again each time. Dicts in which layers leave something for later ones
(the keys and values that Gemma 4's layers share) are stored and filled again. After the part the pass is abandoned and its
output is stored on the host.

Models of at most `model_parts.KEEP_BYTES` in float32 keep their weights, so that they are read once for everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints import model_parts
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.reference.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import Tensor


class _PausedError(Exception):
    """The forward pass is abandoned: a part has computed, or was reached."""


class _EmbeddingsError(Exception):
    """The forward pass reads the embeddings again after the first layer."""


@dataclass
class Batch:
    """Token ids on their way through a model.

    Attributes:
        ids: int64 (rows, length), on the model's device.
        parts: those that have computed, in their order.
        output: of the last one, on the host.
        shapes: of each one's output, as tensors without memory.
        left: what the parts left in dicts for later ones, by the name of the argument, on the host.
    """

    ids: Tensor
    parts: tuple[str, ...] = ()
    output: Any = None
    shapes: list[Any] = field(default_factory=list)
    left: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Batch:
        """Another one at the same part; what is stored is never changed in place."""
        return Batch(self.ids, self.parts, self.output, list(self.shapes), dict(self.left))

    @property
    def calls(self) -> int:
        """The number of parts that have computed."""
        return len(self.parts)

    def split(self, rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` of its rows, for the output layer."""
        for start in range(0, len(self.ids), rows):
            taken = slice(start, start + rows)
            yield Batch(
                self.ids[taken], self.parts, each(self.output, lambda tensor: tensor[taken]),  # noqa: B023
                [each(shape, lambda tensor: tensor[taken]) for shape in self.shapes],  # noqa: B023
            )  # fmt: skip


class StreamedModel:
    """The model of a checkpoint folder, see the module's description.

    Attributes:
        skeleton: its parts.
        keeps: whether it keeps its weights.
        observer: makes a context for each forward pass; see `live`.
        head: the output layer's part; "" if it has none.
        live: whether what is being computed is real: it comes after the last part that has computed.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Build the model; reads only what is in no part.

        Raises:
            JobError: as `Skeleton`.
        """
        self.skeleton = Skeleton(folder, device)
        self.model = self.skeleton.model
        self.keeps = 4 * self.skeleton.parameters <= model_parts.KEEP_BYTES
        self.observer: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.live = True
        self._names = list(self.skeleton.parts)
        head = self.model.get_output_embeddings()
        self.head = next((name for name, module in self.skeleton.parts.items() if module is head), "")
        self._batch: Batch | None = None
        self._goal: Literal["reach", "compute", "logits"] = "compute"
        self._number, self._reached, self._output = 0, "", None
        self._embeds_again = False
        for name, module in self.skeleton.parts.items():
            module.forward = partial(self._call, name, module.forward)

    @property
    def device(self) -> str:
        """Where it computes."""
        return self.skeleton.device

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the embeddings have."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def logits_width(self) -> int:
        """The number of logits for each token."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def batch(self, ids: NDArray[Any]) -> Batch:
        """A batch of token ids (rows, length)."""
        import torch

        return Batch(torch.from_numpy(ids.astype(np.int64)).to(self.device))

    def next_part(self, batch: Batch) -> str | None:
        """The part that computes next; None if only the output layer is left."""
        self._forward(batch, "reach")
        return None if self._reached == self.head else self._reached

    def advance(self, batch: Batch) -> Any:
        """Compute the next part; returns its output, on the device."""
        self._forward(batch, "compute")
        output, self._output = self._output, None
        return output

    def logits(self, batch: Batch) -> Tensor:
        """The logits of a batch whose other parts have computed, float32 (rows * length, vocabulary), on the device."""
        return self._forward(batch, "logits").logits.float().flatten(0, 1)

    def to_the_head(self, batches: Sequence[Batch], report: Callable[[int, int, str], None]) -> None:
        """Compute everything but the output layer for all batches."""
        total, done = len(self._names) * len(batches), 0
        while batches and (part := self.next_part(batches[0])) is not None:
            for batch in batches:
                self.advance(batch)
                report(done := done + 1, total, part)
            self.release()

    def whole(self) -> Any:
        """The model with all its weights, to be called as it is."""
        return self.skeleton.fill_all()

    def release(self) -> None:
        """Free the weights of the parts that have computed, unless the model is small."""
        for part in () if self.keeps else self.skeleton.filled:
            if not (self._embeds_again and part == self._names[0]):
                self.skeleton.empty(part)

    def _forward(self, batch: Batch, goal: Literal["reach", "compute", "logits"]) -> Any:
        self._batch, self._goal, self._number, self.live = batch, goal, 0, not batch.calls
        try:
            with nullcontext() if goal == "reach" else self.observer():
                return self.model(input_ids=batch.ids, use_cache=False)
        except _PausedError:
            return None
        except _EmbeddingsError:
            self._embeds_again = True
        finally:
            self._batch, self.live = None, True
        return self._forward(batch, goal)

    def _call(self, part: str, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What each part does instead of its own `forward`."""
        batch, number = self._batch, self._number
        self._number += 1
        if batch is None or (number == 0 < batch.calls and self._embeds_again):
            self.live = batch is None or batch.calls == 1
            self.skeleton.fill(part)
            return forward(*arguments, **named)
        if number < batch.calls - 1:
            # Some families scale the embeddings in place (CTRL), which needs memory of their own.
            return each(batch.shapes[number], partial(self._nothing, own=number == 0))
        if number == batch.calls - 1:
            self.live = True
            return each(batch.output, self._sent)
        self._reached = part
        if self._goal == "reach" or (self._goal == "compute" and part == self.head):
            raise _PausedError
        if part in batch.parts:
            raise JobError(
                f"{self.skeleton.folder}: {type(self.model).__name__} runs {part} more than once in a pass, and the "
                "reference engine computes each part once; use a model of another family"
            )
        if number > 1 and not self._embeds_again and _has_nan([*arguments, *named.values()]):
            raise _EmbeddingsError
        self._fill(part)
        if number == 0:  # Llama 4 sends the ids to where the weights of the embeddings are, which may be nowhere yet
            arguments = each(arguments, lambda tensor: batch.ids if tensor.is_meta else tensor)
        shared = {key: value for key, value in named.items() if isinstance(value, MutableMapping)}
        for key, value in shared.items():
            value.update(each(batch.left.get(key, {}), self._sent))
        output = forward(*arguments, **named)
        if self._goal == "logits":
            return output
        batch.left = {key: each(dict(value), lambda tensor: tensor.cpu()) for key, value in shared.items()}
        self._output = output
        batch.parts, batch.output = (*batch.parts, part), each(output, lambda tensor: tensor.cpu())
        batch.shapes.append(each(output, lambda tensor: tensor.to("meta")))
        raise _PausedError

    def _fill(self, part: str) -> None:
        self.skeleton.fill(part)
        following = self._names.index(part) + 1
        if following < len(self._names):
            self.skeleton.prefetch(self._names[following])

    def _sent(self, tensor: Tensor) -> Tensor:
        """A copy on the device, since a family may change it in place."""
        return tensor.to(self.device, copy=True)

    def _nothing(self, like: Tensor, *, own: bool) -> Tensor:
        """A tensor that makes NaN of everything that reads it; without `own` it takes no memory."""
        import torch

        filler = math.nan if like.is_floating_point() else 0
        shape = like.shape if own else ()
        return torch.full(shape, filler, dtype=like.dtype, device=self.device).expand(like.shape)


def each(values: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure of tuples, lists and dicts with every tensor changed; anything else stays."""
    import torch

    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, (tuple, list)):
        return type(values)(each(value, change) for value in values)
    if isinstance(values, dict):
        return {key: each(value, change) for key, value in values.items()}
    return values


def first_tensor(output: Any) -> Tensor:
    """The hidden states in the output of a part, which may be a tuple."""
    return first_tensor(output[0]) if isinstance(output, (tuple, list)) else output


def _has_nan(values: Any) -> bool:
    found = []
    each(values, lambda tensor: found.append(tensor.is_floating_point() and bool(tensor.isnan().any())))
    return any(found)
