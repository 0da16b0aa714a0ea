"""The measurements of an evaluation besides perplexity: their inputs, the worker's job, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import GenerationsConfig, RestoreConfig
from quantline.config.limits import LimitsConfig
from quantline.data.windows import Windows, save_windows, some_documents
from quantline.evaluation import generations, sensitivity


@dataclass(frozen=True)
class Measurement:
    """The result of one part of an evaluation.

    Attributes:
        metrics: numbers by name.
        section: plain values for `comparison.json`; None if nothing was measured.
        tables: rows by table, for the stage's result.
        files: written files, relative to the output.
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
        calibration: the samples that its errors were measured on.
        samples: how many of them were used.
        unfold: whether scales were folded into neighbours; None detects it.
        restore: how many linears are put back to float, one at a time.
    """

    quantized: Path
    calibration: Path
    samples: int
    unfold: bool | None
    restore: RestoreConfig


@dataclass(frozen=True)
class MeasurementOptions:
    """The measurements to make; by default only perplexity and likeliest tokens.

    Attributes:
        divergence: number of tokens whose distributions are compared with the float model's; None for all.
        generations: the continuations to compare.
        layers: the inputs for errors of single linears.
        limits, fail_on: see `thresholds`.
        noise: the result of `stages.noise` for the variant, if there is one.
        changed_files: number of the checkpoint's files that have changed, if known.
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
    """The worker's job, and the data needed to read its result.

    Attributes:
        job: keys of the worker's job.
        prompts: prompts of the continuations.
        rows: rows of the quantize stage's table.
        part: the windows that are scored again for each restored linear.
        chosen: the indices of their documents.
        restored: the file that the worker writes those scores to.
        served: the server's continuations of the prompts; None if the worker continues them.
    """

    job: dict[str, Any]
    prompts: generations.Prompts
    rows: list[dict[str, Any]]
    part: Windows | None = None
    chosen: NDArray[np.int64] | None = None
    restored: Path | None = None
    served: dict[str, Any] | None = None


def plan(
    instruments: MeasurementOptions, windows: Windows, *, baseline: bool, float_model: Path, served: Path, work: Path
) -> WorkerRequest:
    """Choose prompts and windows, and build the worker's job.

    Args:
        baseline: whether there is a float baseline to compare with; not so if the checkpoint is the float model.
        float_model: folder of the float model.
        served: the output of serve_smoke.
        work: a folder for temporary files.
    """
    options = instruments.generations
    prompts = generations.choose_prompts(windows, options.prompts, options.prompt_tokens) if options else _NO_PROMPTS
    job: dict[str, Any] = {}
    continued = generations.served_generations(served, prompts, options.new_tokens) if options else None
    if options and prompts.tokens and continued is None:
        job["generate"] = {"prompts": [list(tokens) for tokens in prompts.tokens], "new_tokens": options.new_tokens}
    if not baseline or instruments.divergence == 0:
        return WorkerRequest(job, prompts, [], served=continued)
    job.update(baseline=str(float_model), divergence_tokens=instruments.divergence)
    layers = instruments.layers
    rows = sensitivity.read_layers(layers.quantized) if layers else []
    if not layers or not rows:
        return WorkerRequest(job, prompts, rows, served=continued)
    job["layers"] = {
        "linears": [row["name"] for row in rows], "calibration": str(layers.calibration), "samples": layers.samples,
        "unfold": layers.unfold,
    }  # fmt: skip
    if not layers.restore.layers:
        return WorkerRequest(job, prompts, rows, served=continued)
    part, chosen = some_documents(windows, layers.restore.tokens)
    restored = work / "restored.safetensors"
    job["restore"] = {"count": layers.restore.layers, "windows": str(save_windows(part, work)), "output": str(restored)}
    return WorkerRequest(job, prompts, rows, part, chosen, restored, continued)


_NO_PROMPTS = generations.Prompts((), ())
