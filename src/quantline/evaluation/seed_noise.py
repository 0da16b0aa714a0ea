"""How much of a measured loss is chance: one variant quantized several times, each time on other calibration samples.

The seed draws the calibration samples and whatever the backend draws; everything else stays. What spreads between the runs
is a property of the method on this model and text, and a difference between two variants that is smaller says nothing.
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
    """One of the runs: its seed, what it lost against the float model, and the hash of the weights it made.

    nll_difference: nats a token; perplexity_change: of the perplexity, relative.
    """

    seed: int
    nll_difference: float
    perplexity_change: float
    top1_agreement: float
    output_hash: str


@dataclass(frozen=True)
class Spread:
    """Over all runs: of the relative change of perplexity the mean, standard deviation (n - 1), smallest and largest."""

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
        """A row a run, for the result's tables."""
        return [asdict(run) for run in self.runs]


def spread(runs: Sequence[SeededRun]) -> Spread:
    """Summarize.

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
    """Quantize and judge once a seed.

    Args:
        seeds: one a run.
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
