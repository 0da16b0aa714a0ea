"""What an evaluation measures beside perplexity: what it needs for that, what the worker is told, and what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import GenerationsConfig, LimitsConfig, RestoreConfig
from quantline.data.windows import Windows, save_windows, some_documents
from quantline.evaluation import generations, sensitivity


@dataclass(frozen=True)
class Measurement:
    """What one part of an evaluation found.

    Attributes:
        metrics: numbers by name.
        section: plain values for `comparison.json`; None where nothing was measured.
        tables: rows by table, for the stage's result.
        files: written ones, relative to the output.
        notes: sentences for the user.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    section: dict[str, Any] | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerInputs:
    """The files and options for measuring single linears.

    Attributes:
        quantized: output of the quantize stage.
        calibration: the tokens that its errors were measured on.
        samples: how many of them were used.
        unfold: whether scales were folded into neighbours; None finds out.
        restore: how many linears are put back to float, one at a time.
    """

    quantized: Path
    calibration: Path
    samples: int
    unfold: bool | None
    restore: RestoreConfig


@dataclass(frozen=True)
class MeasurementOptions:
    """What is measured; by default perplexity and likeliest tokens alone.

    Attributes:
        divergence: of how many tokens the distributions are compared with the float model's; None is all.
        generations: the continuations to compare.
        layers: for errors of single linears.
        limits, fail_on: see `thresholds`.
        noise: what `stages.noise` measured of the variant, if it did.
        changed_files: how many files of the checkpoint are not what they were, if that is known.
    """

    divergence: int | None = 0
    generations: GenerationsConfig | None = None
    layers: LayerInputs | None = None
    limits: LimitsConfig | None = None
    fail_on: tuple[str, ...] = ()
    noise: Mapping[str, Any] | None = None
    changed_files: int | None = None


@dataclass(frozen=True)
class WorkerRequest:
    """What the worker is told, and what is needed to read its answer.

    Attributes:
        job: keys of the worker's job.
        prompts: of the continuations.
        rows: of the quantize stage's table.
        part: the windows that are scored again for each restored linear.
        chosen: numbers of their documents.
        restored: the file that the worker writes those scores to.
    """

    job: dict[str, Any]
    prompts: generations.Prompts
    rows: list[dict[str, Any]]
    part: Windows | None = None
    chosen: NDArray[np.int64] | None = None
    restored: Path | None = None


def plan(
    instruments: MeasurementOptions, windows: Windows, *, baseline: bool, float_model: Path, work: Path
) -> WorkerRequest:
    """Choose prompts and windows, and say to the worker what to measure.

    Args:
        baseline: whether the checkpoint is another model than the float model; if not, nothing can be compared.
        float_model: folder of the float model.
        work: a folder for temporary files.
    """
    asked = instruments.generations
    prompts = generations.choose_prompts(windows, asked.prompts, asked.prompt_tokens) if asked else _NO_PROMPTS
    job: dict[str, Any] = {}
    if asked and prompts.tokens:
        job["generate"] = {"prompts": [list(tokens) for tokens in prompts.tokens], "new_tokens": asked.new_tokens}
    if not baseline or instruments.divergence == 0:
        return WorkerRequest(job, prompts, [])
    job.update(baseline=str(float_model), divergence_tokens=instruments.divergence)
    layers = instruments.layers
    rows = sensitivity.read_layers(layers.quantized) if layers else []
    if not layers or not rows:
        return WorkerRequest(job, prompts, rows)
    job["layers"] = {
        "linears": [row["name"] for row in rows], "calibration": str(layers.calibration), "samples": layers.samples,
        "unfold": layers.unfold,
    }  # fmt: skip
    if not layers.restore.layers:
        return WorkerRequest(job, prompts, rows)
    part, chosen = some_documents(windows, layers.restore.tokens)
    restored = work / "restored.safetensors"
    job["restore"] = {"count": layers.restore.layers, "windows": str(save_windows(part, work)), "output": str(restored)}
    return WorkerRequest(job, prompts, rows, part, chosen, restored)


_NO_PROMPTS = generations.Prompts((), ())
