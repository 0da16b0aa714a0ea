"""How much of a measured loss is chance: one variant is quantized several times on different calibration samples.

The seed decides the calibration samples and the backend's random numbers; everything else stays the same. The spread of the
runs is a property of the method on this model and text. Two variants whose difference is smaller cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quantline.evaluation.evaluate import Verdict
from quantline.evaluation.nats import growth


@dataclass(frozen=True)
class SeededRun:
    """One run.

    Attributes:
        seed: of the run.
        nll_difference: from the float model, in nats per token.
        perplexity_change: from the float model, relative.
        top1_agreement: with the float model.
        output_hash: hash of the weights that it produced.
    """

    seed: int
    nll_difference: float
    perplexity_change: float
    top1_agreement: float
    output_hash: str


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (n - 1), minimum and maximum of the relative change of perplexity over all runs."""

    runs: tuple[SeededRun, ...]
    mean: float
    deviation: float
    low: float
    high: float
    distinct_outputs: int

    @property
    def metrics(self) -> dict[str, float]:
        """For the stage's result."""
        return {
            "runs": float(len(self.runs)), "perplexity_change_mean": self.mean, "perplexity_change_std": self.deviation,
            "perplexity_change_min": self.low, "perplexity_change_max": self.high,
            "distinct_outputs": float(self.distinct_outputs),
        }  # fmt: skip

    @property
    def rows(self) -> list[dict[str, object]]:
        """One row per run, for the result's tables."""
        return [asdict(run) for run in self.runs]


def spread(runs: Sequence[SeededRun]) -> Spread:
    """Summarize the runs.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} runs have no spread; give two or more")
    changes = np.array([run.perplexity_change for run in runs])
    return Spread(
        tuple(runs), float(changes.mean()), float(changes.std(ddof=1)), float(changes.min()), float(changes.max()),
        len({run.output_hash for run in runs}),
    )  # fmt: skip


def measure(seeds: Sequence[int], make: Callable[[int], tuple[Path, str]], judge: Callable[[Path], Verdict]) -> Spread:
    """Quantize and evaluate once per seed.

    Args:
        seeds: one for each run.
        make: quantizes under a seed; returns the checkpoint and the hash of its files.
        judge: compares a checkpoint with the float model.
    """
    runs = []
    for seed in seeds:
        checkpoint, output_hash = make(seed)
        metrics = judge(checkpoint).metrics
        difference = metrics["nll_difference"]
        runs.append(
            SeededRun(seed, difference, growth(difference), metrics.get("top1_agreement", math.nan), output_hash)
        )
    return spread(runs)
