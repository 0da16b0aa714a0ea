"""Scores windows of tokens with a checkpoint, and compares every next-token distribution with the float model's.

Both models go through their layers side by side. Linears that are to be put back to float branch off at their layer, so
that only what comes after it is computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.model_parts import MOST_LOGITS
from quantline.toolchains.protocol import Reporter
from quantline.toolchains.workers.reference.divergence import Apart, kl_divergence
from quantline.toolchains.workers.reference.streaming import Batch, StreamedModel, first_tensor

if TYPE_CHECKING:
    from torch import Tensor

# Rows of logits normalised at a time, so that float32 temporaries stay small compared with the logits.
_ROWS = 512


class Beside(Protocol):
    """Something else that is computed while the weights of a part are there."""

    def advance(self, part: str) -> None:
        """Compute a part, which both models have."""

    def finish(self) -> None:
        """Compute the logits; all other parts have computed."""


@dataclass
class Windows:
    """Windows of one length, in one batch.

    Attributes:
        places: int64 (rows, length), where their tokens are among all tokens.
        targets: int64 (rows * (length - 1),), the tokens to predict.
        own: the batch in the checkpoint's model. The last token of a window is not in it: it predicts nothing.
        base: the batch in the float model; None if the two are not compared here.
    """

    places: NDArray[np.int64]
    targets: Tensor
    own: Batch
    base: Batch | None

    @property
    def scored(self) -> NDArray[np.int64]:
        """Where the predicted tokens are among all tokens."""
        return self.places[:, 1:].reshape(-1)


@dataclass
class Scores:
    """What is kept per position of all windows; `evaluate` reads it by these names from the stage's output.

    Attributes:
        logprobs: float32 (tokens,) in nats, NaN at the start of a window.
        top1: int32 (tokens,), the most likely token, -1 at the start of a window.
        kl: float32 (tokens,), KL(float || checkpoint) in nats, NaN at the start of a window and where not computed; None
            without a float model.
        beside_seconds: what `beside` took of the time.
        parts: how far the output of each part is from the float model's.
    """

    logprobs: NDArray[np.float32]
    top1: NDArray[np.int32]
    kl: NDArray[np.float32] | None
    beside_seconds: float = 0.0
    parts: dict[str, Apart] = field(default_factory=dict)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What is written."""
        kept: dict[str, NDArray[Any]] = {"logprobs": self.logprobs, "top1": self.top1}
        return kept if self.kl is None else {**kept, "kl": self.kl}

    def states(self) -> list[dict[str, Any]]:
        """A row for each part: its name, and `state_error`, the relative difference from the float model."""
        return [{"name": name, "state_error": apart.relative} for name, apart in self.parts.items()]

    def sums(self) -> dict[str, list[list[float]]]:
        """What `add` takes of each part, as plain values."""
        return {name: [apart.errors, apart.energies] for name, apart in self.parts.items()}

    def add(self, tensors: Mapping[str, NDArray[Any]], sums: Mapping[str, list[list[float]]]) -> None:
        """Add what another process has scored, of the same windows but in other batches."""
        scored = tensors["top1"] >= 0
        for name, own in self.tensors().items():
            own[scored] = tensors[name][scored]
        for name, (errors, energies) in sums.items():
            apart = self.parts.setdefault(name, Apart())
            apart.errors += errors
            apart.energies += energies


def plan_batches(offsets: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Group windows of equal length, so that nothing is padded. Returns lists of window numbers, longest windows first.

    Windows of fewer than two tokens predict nothing and are left out.

    Args:
        offsets: int64 (windows + 1,).
        batch_tokens: upper limit of tokens in a batch; a longer window is a batch of its own.
    """
    lengths = np.diff(offsets)
    batches: list[NDArray[np.int64]] = []
    for length in sorted(set(lengths[lengths > 1].tolist()), reverse=True):
        members = np.flatnonzero(lengths == length)
        rows = max(1, batch_tokens // length)
        batches.extend(members[start : start + rows] for start in range(0, len(members), rows))
    return batches


class Scoring:
    """Scores windows with one or two models; see `score`."""

    def __init__(self, own: StreamedModel, base: StreamedModel | None, batch_tokens: int) -> None:
        """batch_tokens: upper limit of tokens computed at once."""
        self._own, self._base = own, base
        room = MOST_LOGITS // own.logits_width // (1 if base is None else 2)
        self._batch_tokens = min(batch_tokens, room)

    def windows(self, tensors: Mapping[str, NDArray[Any]], compared: int | None = None) -> list[Windows]:
        """Batches of windows.

        Args:
            tensors: `input_ids` int32 (tokens,), `offsets` int64 (windows + 1,), the start of each; the last entry is the
                number of tokens.
            compared: compare about this many tokens with the float model, in batches spread over all; None means all.
        """
        import torch

        input_ids, offsets = tensors["input_ids"], tensors["offsets"]
        planned = plan_batches(offsets, self._batch_tokens)
        total = sum(int((offsets[batch + 1] - offsets[batch]).sum()) for batch in planned)
        share = 1.0 if compared is None else min(1.0, compared / max(total, 1))
        made = []
        for number, batch in enumerate(planned):
            length = int(offsets[batch[0] + 1] - offsets[batch[0]])
            places = offsets[batch][:, None] + np.arange(length)
            ids = input_ids[places]
            targets = torch.from_numpy(ids[:, 1:].reshape(-1).astype(np.int64)).to(self._own.device)
            # The first batch is always compared, so that a text of one batch has values.
            chosen = self._base is not None and math.ceil((number + 1) * share) > math.ceil(number * share)
            base = self._base.batch(ids[:, :-1]) if self._base is not None and chosen else None
            made.append(Windows(places, targets, self._own.batch(ids[:, :-1]), base))
        return made

    def score(self, tokens: int, batches: Sequence[Windows], report: Reporter, beside: Beside | None = None) -> Scores:
        """Score all windows.

        Args:
            tokens: the number of tokens in all windows.
            beside: computes along, on batches of its own.
        """
        kept = Scores(
            np.full(tokens, np.nan, np.float32), np.full(tokens, -1, np.int32),
            None if self._base is None else np.full(tokens, np.nan, np.float32),
        )  # fmt: skip
        own, base = self._own, self._base
        total, done = len(own.skeleton.parts) * len(batches), 0
        while batches and (part := own.next_part(batches[0].own)) is not None:
            apart = kept.parts[part] = Apart()
            for batch in batches:
                states = own.advance(batch.own)
                if base is not None and batch.base is not None:
                    apart.add(first_tensor(base.advance(batch.base)), first_tensor(states))
                report(done := done + 1, total, part)
            if base is not None:
                if beside is not None:
                    with _timed(kept):
                        beside.advance(part)
                base.release()
            own.release()
        for batch in batches:
            logits = own.logits(batch.own)
            kept.logprobs[batch.scored] = log_probabilities(logits, batch.targets)
            kept.top1[batch.scored] = logits.argmax(dim=1).cpu().numpy()
            if base is not None and batch.base is not None and kept.kl is not None:
                kept.kl[batch.scored] = kl_divergence(base.logits(batch.base), logits).float().cpu().numpy()
            report(done := done + 1, total, "logits")
        if beside is not None:
            with _timed(kept):
                beside.finish()
        for model in (own, base):
            if model is not None:
                model.release()
        return kept


@contextmanager
def _timed(kept: Scores) -> Iterator[None]:
    started = time.perf_counter()
    yield
    kept.beside_seconds += time.perf_counter() - started


def log_probabilities(logits: Tensor, targets: Tensor) -> NDArray[np.float32]:
    """The natural logarithm of each target's probability.

    Args:
        logits: float32 (rows, vocabulary).
        targets: int64 (rows,).

    Returns:
        float32 (rows,).
    """
    import torch

    chosen = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        picked = logits[rows].gather(1, targets[rows, None]).squeeze(1)
        chosen[rows] = picked - logits[rows].logsumexp(dim=1)
    found: NDArray[np.float32] = chosen.cpu().numpy()
    return found
