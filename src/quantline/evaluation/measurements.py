"""What an evaluation measures beside perplexity, and what the job to the worker says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.data.windows import Windows, save_windows, some_documents
from quantline.evaluation import generations, sensitivity


@dataclass(frozen=True)
class Generations:
    """Greedy continuations: how many prompts, tokens in and out, and the margin in nats that counts as a tie."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    tie_margin: float


@dataclass(frozen=True)
class Layers:
    """Errors of the single linears, and what the worst of them cost.

    quantized: output of the quantize stage. calibration: tokens that its errors were measured on, `samples` of them. unfold:
    whether scales were folded into neighbours; None finds out. restore: how many linears are put back to float, one at a
    time. tokens: scored for each.
    """

    quantized: Path
    calibration: Path
    samples: int
    unfold: bool | None
    restore: int
    tokens: int


@dataclass(frozen=True)
class Instruments:
    """All of it; by default perplexity and likeliest tokens alone.

    divergence: from the float model, of so many tokens; None is all. limits, fail_on: see `thresholds`. noise: what
    `stages.noise` measured of the variant, where it did. changed_files: how many files of the checkpoint are not what they
    were, where that is known.
    """

    divergence: int | None = 0
    generations: Generations | None = None
    layers: Layers | None = None
    limits: Mapping[str, float | None] = field(default_factory=dict)
    fail_on: tuple[str, ...] = ()
    noise: Mapping[str, Any] | None = None
    changed_files: int | None = None


@dataclass(frozen=True)
class Plan:
    """What goes to the worker (`job`), and what is needed to read its answer.

    rows: of the quantize stage's table. part: the windows that are scored again, `chosen` their documents. restored: where
    the worker puts what came of it.
    """

    job: dict[str, Any]
    prompts: generations.Prompts
    rows: list[dict[str, Any]]
    part: Windows | None = None
    chosen: NDArray[np.int64] | None = None
    restored: Path | None = None


def plan(instruments: Instruments, windows: Windows, *, baseline: bool, float_model: Path, work: Path) -> Plan:
    """Settle the worker's parts.

    Args:
        baseline: whether there is a float model other than the one judged: without it there is nothing to compare with.
        work: a folder for what is not kept.
    """
    wish = instruments.generations
    prompts = generations.choose_prompts(windows, wish.prompts, wish.prompt_tokens) if wish else _NO_PROMPTS
    job: dict[str, Any] = {}
    if wish and prompts.tokens:
        job["generate"] = {"prompts": [list(tokens) for tokens in prompts.tokens], "new_tokens": wish.new_tokens}
    if not baseline or instruments.divergence == 0:
        return Plan(job, prompts, [])
    job.update(baseline=str(float_model), divergence_tokens=instruments.divergence)
    layers = instruments.layers
    rows = sensitivity.read_layers(layers.quantized) if layers else []
    if not layers or not rows:
        return Plan(job, prompts, rows)
    job["layers"] = {
        "linears": [row["name"] for row in rows], "calibration": str(layers.calibration), "samples": layers.samples,
        "unfold": layers.unfold,
    }  # fmt: skip
    if not layers.restore:
        return Plan(job, prompts, rows)
    part, chosen = some_documents(windows, layers.tokens)
    restored = work / "restored.safetensors"
    job["restore"] = {"count": layers.restore, "windows": str(save_windows(part, work)), "output": str(restored)}
    return Plan(job, prompts, rows, part, chosen, restored)


_NO_PROMPTS = generations.Prompts((), ())
