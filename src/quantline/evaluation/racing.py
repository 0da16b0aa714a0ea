"""Scores checkpoints on growing shares of the documents, each document once; what was scored is kept and found again.

A share's documents include those of the smaller shares. What a share adds is one file of the folder, written whole, so
that a search that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import BootstrapConfig
from quantline.core.files import replaced
from quantline.data.sampling import draw
from quantline.data.windows import Windows, of_documents, save_windows
from quantline.evaluation.bootstrap import Interval, paired_bootstrap
from quantline.evaluation.nats import growth
from quantline.evaluation.perplexity import document_sums, load_scores
from quantline.toolchains.protocol import JobResult

_WORKER = ("reference", "quantline.toolchains.workers.reference.evaluate")
_FEWEST = 8  # documents of the smallest share: an interval over fewer says little

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Engine:
    """How the reference engine runs: (toolchain, module, job, label) -> result, device, threads, tokens at once."""

    run_worker: RunWorker
    device: str
    threads: int
    batch_tokens: int


class Race:
    """Losses of checkpoints on shares of one text.

    Attributes:
        shares: documents of each share, ascending numbers.
        scored: how often a checkpoint was scored here; what was found does not count.
    """

    def __init__(
        self, windows: Windows, shares: Sequence[float], engine: Engine, folder: Path, baseline: Path | None = None
    ) -> None:
        """Set it up.

        Args:
            windows: of the whole text.
            shares: growing, the last one 1.
            engine: for scoring.
            folder: keeps the losses.
            baseline: the float model, which is scored beside every checkpoint on the smallest share for `divergence`.
        """
        self._baseline = baseline
        count = len(windows.document_ids)
        order = sorted(range(count), key=lambda number: draw(0, "race", number))
        ends = [min(count, max(_FEWEST, round(share * count))) for share in shares]
        self.shares = [np.sort(np.array(order[:end], dtype=np.int64)) for end in ends]
        starts = [0, *ends[:-1]]
        self._added = [
            np.sort(np.array(order[start:end], dtype=np.int64)) for start, end in zip(starts, ends, strict=True)
        ]
        self._windows, self._engine, self._folder, self.scored = windows, engine, folder, 0

    def sums(self, key: str, checkpoint: Callable[[], Path], share: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The loss of each document of a share in nats, and its tokens; float64 (documents,) each.

        Args:
            key: names the checkpoint's content.
            checkpoint: makes it where it is needed.
            share: number of the share.
        """
        count = len(self._windows.document_ids)
        nll, tokens = np.full(count, np.nan), np.full(count, np.nan)
        for step in range(share + 1):
            if len(self._added[step]):
                nll[self._added[step]], tokens[self._added[step]] = self._step(key, checkpoint, step)[:2]
        return nll[self.shares[share]], tokens[self.shares[share]]

    def divergence(self, key: str, checkpoint: Callable[[], Path]) -> float | None:
        """KL(float || checkpoint) on the smallest share, nats a token; None if it was scored without the float model."""
        found = self._step(key, checkpoint, 0)
        return float(found[2].sum() / found[1].sum()) if len(found) > 2 else None

    def _step(self, key: str, checkpoint: Callable[[], Path], step: int) -> NDArray[Any]:
        part = of_documents(self._windows, self._added[step])
        named = hashlib.sha256(f"{key} {part.sha256}".encode()).hexdigest()[:24]
        kept = self._folder / f"{named}.npy"
        if kept.is_file():
            found: NDArray[Any] = np.load(kept)
            return found
        with TemporaryDirectory(prefix="quantline-race-") as work:
            out = Path(work, "scores.safetensors")
            own, beside = checkpoint(), self._baseline if step == 0 else None
            job = {
                "checkpoint": str(own), "windows": str(save_windows(part, Path(work))), "output": str(out),
                "device": self._engine.device, "threads": self._engine.threads,
                "batch_tokens": self._engine.batch_tokens,
                **({"baseline": str(beside)} if beside is not None and beside != own else {}),
            }  # fmt: skip
            self._engine.run_worker(*_WORKER, job, f"score {len(part.document_ids)} documents")
            scores = load_scores(out)
            sums = np.stack(document_sums(part, -scores["logprobs"]))
            if "baseline" in job:
                sums = np.concatenate([sums, document_sums(part, scores["kl"])[:1]])
        self.scored += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        with replaced(kept) as temporary, temporary.open("wb") as file:
            np.save(file, sums)
        return sums


def compared(
    own: tuple[NDArray[Any], NDArray[Any]], base: tuple[NDArray[Any], NDArray[Any]], how: BootstrapConfig
) -> Interval:
    """The relative growth of the perplexity against the float model, with its paired interval.

    own, base: losses and tokens of the same documents.
    """
    scored = own[1] > 0
    found = paired_bootstrap(own[0][scored], base[0][scored], own[1][scored], how)
    return Interval(growth(found.estimate), growth(found.low), growth(found.high))
