"""The gate on layer errors: is a quantized checkpoint complete, and how far is each linear from the float one.

First the files are checked (`file_checks`); a fault there is raised at once. Then the worker
`toolchains.workers.reference.layer_errors` runs the float model over calibration samples and measures every linear. The
result is a table, a heat map and metrics. The limits are in the configuration's section `layer_errors`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from threading import Thread
from typing import Any

from quantline.checkpoints import linears as linears_module
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.config.layer_errors import ErrorLevels, LayerErrorsConfig
from quantline.core.errors import WorkerError
from quantline.quantization import heat_map
from quantline.quantization.capabilities import CALIBRATED
from quantline.quantization.file_checks import FileChecks, inspect, some
from quantline.toolchains.protocol import JobResult

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]
Row = dict[str, Any]

FOLDER = "coverage"
_WORKER = ("reference", "quantline.toolchains.workers.reference.layer_errors")
_TIMES = ("seconds",)
TABLE, PLOT = f"{FOLDER}/layers.csv", f"{FOLDER}/output_error.png"
# Methods whose grid is that of rounding to nearest.
_INTEGER_GRIDS = ("autoround", "awq", "gptq")
HELD_ERRORS = ("held_error", "rounding_error")
_MEASURED = ("output_error", "weight_error", "weight_error_max", "weight_error_mean")
_WORST = 5
_TITLES = {"output_error": "the output's", "weight_error": "the weights'"}


@dataclass(frozen=True)
class LayerErrors:
    """The layer errors of one quantized checkpoint.

    Attributes:
        rows: one per linear, by layer: name, layer (number; -1 outside the layers), module (name inside it),
            in_features, out_features, bits, group_size, effective_bits, tokens (calibration tokens that reach it in the
            float model, None if that cannot be observed), output_error, weight_error, weight_error_max, weight_error_mean,
            level, and the backend's own columns.
        metrics: numbers by name.
        warnings: sentences for the user.
        files: the written files, relative to the output.
        worst: the linears with the largest output errors, as text.
    """

    rows: list[Row]
    metrics: dict[str, float]
    warnings: list[str]
    files: list[str] = field(default_factory=list)
    worst: str = ""


@contextmanager
def early(start: Callable[[str, str], AbstractContextManager[None]], *, enabled: bool) -> Iterator[None]:
    """While a quantizer computes, import the libraries for `measure`: in its worker, and here for the heat map.

    Args:
        start: (toolchain, module) -> a context in which that worker waits for a job.
        enabled: whether errors will be measured at all.
    """
    if not enabled:
        yield
        return
    Thread(target=heat_map.imports, daemon=True).start()
    with start(*_WORKER):
        yield


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint, and what it was made from.

    Attributes:
        model: folder of the float model.
        output: folder of the quantized one.
        calibration: tokens.safetensors, `input_ids` int32 (n, length).
        linears: the linears that should be quantized, by name.
        method: awq, gptq, rtn, bnb or autoround. Scales folded by awq are undone before weights are compared.
        rules: exceptions by name, see `select_linears`.
        backend_rows: the backend's own rows, with `layer` and `module`, or with the full name in `module`.
    """

    model: Path
    output: Path
    calibration: Path
    linears: Mapping[str, LinearSpec]
    method: str
    rules: Sequence[Mapping[str, Any]] = ()
    backend_rows: Sequence[Mapping[str, Any]] = ()


def measure(
    made: Quantized,
    settings: LayerErrorsConfig,
    *,
    run_worker: RunWorker,
    threads: int = 2,
    device: str = "cpu",
    failed: Path | None = None,
) -> LayerErrors:
    """Measure a quantized checkpoint, and refuse it if an error is above its limit.

    Args:
        made: the checkpoint; its folder gets `coverage/layers.csv` and `coverage/output_error.png`.
        settings: samples, limits and levels.
        run_worker: (toolchain, module, job, label) -> its result.
        threads, device: for the worker.
        failed: a folder for the table and the heat map if the checkpoint does not pass.

    Raises:
        WorkerError: the checkpoint does not pass. The message has every reason, with its worst linears.
    """
    linears, method = made.linears, made.method
    found = inspect(made.model, made.output, list(linears), made.rules)
    if found.faults:
        raise WorkerError(f"the quantized model does not pass the gate on layer errors: {'; '.join(found.faults)}")
    rows = _rows(found, linears, made.backend_rows)
    metrics, warnings = _file_metrics(found), list(found.warnings)
    if not settings.enabled:
        return LayerErrors(rows, metrics, warnings)
    job = {
        "model": str(made.model), "checkpoint": str(made.output), "calibration": str(made.calibration),
        "linears": [row["name"] for row in rows], "samples": settings.samples,
        "unfold": True if method == "awq" else None, "device": device, "threads": threads,
        "rounding": method in _INTEGER_GRIDS,
    }  # fmt: skip
    result = run_worker(*_WORKER, job, "measure every linear")
    for row, measured in zip(rows, result.data["rows"], strict=True):
        row.update(tokens=measured["tokens"], **{key: _rounded(measured[key]) for key in _MEASURED})
        row["level"] = _level(row["output_error"], settings.levels)
        if measured["held_error"] is not None:
            row.update({key: _rounded(measured[key]) for key in HELD_ERRORS})
    metrics.update(_error_metrics(rows, calibrated=method in CALIBRATED), coverage_seconds=result.seconds)
    faults = _error_faults(rows, settings)
    few = _few_tokens(rows, settings.min_tokens) if method in CALIBRATED else []
    if settings.few_tokens == "fail":
        faults += few
    elif settings.few_tokens == "warn":
        warnings += few
    warnings += [*_unmeasured(rows), *_worse_than_rounding(rows, metrics)]
    title = f"Output error of each linear, {result.data['sample_tokens']} calibration tokens"
    if faults:
        kept = ""
        if failed is not None and _write(rows, failed, title):
            kept = f"; all linears: {failed / TABLE}"
        raise WorkerError(f"the quantized model does not pass the gate on layer errors: {'; '.join(faults)}{kept}")
    return LayerErrors(rows, metrics, warnings, _write(rows, made.output, title), _worst(rows, "output_error"))


def _rows(found: FileChecks, linears: Mapping[str, LinearSpec], backend_rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    extra: dict[tuple[int, str], dict[str, Any]] = {}
    for backend_row in backend_rows:
        layer, module = backend_row.get("layer"), str(backend_row.get("module"))
        place = (layer, module) if isinstance(layer, int) and layer >= 0 else linears_module.place_of(module)
        extra[place] = {key: value for key, value in backend_row.items() if key not in ("layer", "module", "name")}
    rows = []
    for name, (wide, tall) in found.linears.items():
        place, width = linears_module.place_of(name), linears[name]
        row = {
            "name": name, "layer": place[0], "module": place[1], "in_features": wide, "out_features": tall,
            "bits": width.bits, "group_size": width.group_size,
            "effective_bits": _rounded(found.stored_bits[name] / (wide * tall)), "tokens": None,
        }  # fmt: skip
        row.update(dict.fromkeys((*_MEASURED, "level")))
        rows.append({**row, **{key: value for key, value in extra.get(place, {}).items() if key not in row}})
    return sorted(rows, key=lambda row: row["layer"] if row["layer"] >= 0 else math.inf)


def _rounded(value: float | None) -> float | None:
    # The last digits differ between machines.
    return None if value is None else float(f"{value:.6g}")


def _level(error: float | None, levels: ErrorLevels) -> str | None:
    if error is None:
        return None
    return "high" if not error < levels.high else "moderate" if error >= levels.moderate else "low"


def _file_metrics(found: FileChecks) -> dict[str, float]:
    return {
        "linears_expected": found.expected,
        "linears_quantized": len(found.linears),
        "quantized_share": found.quantized_weights / found.weights,
        "effective_bits": found.effective_bits,
        "effective_bits_model": found.bits / found.weights,
        "zero_scales": found.zero_scales,
    }


def _error_metrics(rows: Sequence[Row], *, calibrated: bool) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for key in ("output_error", "weight_error"):
        values = [float(row[key]) for row in rows if row[key] is not None]
        if values:
            metrics[f"{key}_max"], metrics[f"{key}_mean"] = max(values), fmean(values)
    for level in ("moderate", "high"):
        metrics[f"linears_{level}"] = sum(row["level"] == level for row in rows)
    seen = [int(row["tokens"]) for row in rows if row["tokens"] is not None]
    if calibrated and seen:
        metrics["min_tokens"] = min(seen)
    return metrics


def _error_faults(rows: Sequence[Row], settings: LayerErrorsConfig) -> list[str]:
    faults = []
    limits_of = {"output_error": settings.max_output_error, "weight_error": settings.max_weight_error}
    for key, whose in _TITLES.items():
        above = []
        for row in rows:
            value, limit = row[key], limits_of[key].of_bits(row["bits"])
            if value is not None and not (math.isfinite(value) and (limit is None or value <= limit)):
                above.append(row)
        if above:
            options = {f"layer_errors.max_{key}.bits{row['bits']}" for row in above}
            faults.append(
                f"{whose} error is above its limit ({', '.join(sorted(options))}) in {len(above)} of {len(rows)} linears: "
                f"{_worst(above, key)}; give these more bits or leave them float by layers.rules{_or_raise(above, key)}"
            )
    return faults


def _or_raise(rows: Sequence[Row], key: str) -> str:
    """The limits that these rows would pass, as options. If a weight is worse than all zeros, no limit helps."""
    needed: dict[str, float] = {}
    for row in rows:
        option = f"layer_errors.max_{key}.bits{row['bits']}"
        needed[option] = max(needed.get(option, 0.0), row[key] if math.isfinite(row[key]) else math.inf)
    if max(needed.values()) >= 1:
        return "; all-zero weights have an error of 1, so linears with 1 or more are broken"
    # Rounded up, so that the rows pass.
    raised = " ".join(f"{option}={math.ceil(100 * value) / 100:g}" for option, value in sorted(needed.items()))
    return f", or raise the limit, if the evaluated model is good enough: {raised}"


def _worst(rows: Sequence[Row], key: str) -> str:
    known = [row for row in rows if row[key] is not None]
    # NaN and infinity sort as worst.
    known.sort(key=lambda row: row[key] if math.isfinite(row[key]) else math.inf, reverse=True)
    return some([f"{row['name']} {row[key]:.3g}" for row in known], _WORST)


def _few_tokens(rows: Sequence[Row], least: int) -> list[str]:
    few = sorted(
        (row for row in rows if row["tokens"] is not None and row["tokens"] < least), key=lambda row: row["tokens"]
    )
    if not few:
        return []
    named = some([f"{row['name']} {row['tokens']}" for row in few], _WORST)
    return [
        f"{len(few)} of {len(rows)} linears saw fewer than {least} calibration tokens (layer_errors.min_tokens) and were "
        f"quantized with too little data: {named}; raise calibration.n_samples"
    ]


def _unmeasured(rows: Sequence[Row]) -> list[str]:
    hidden = [str(row["name"]) for row in rows if row["tokens"] is None]
    untouched = [str(row["name"]) for row in rows if row["tokens"] is not None and row["output_error"] is None]
    notes = []
    if hidden:
        notes.append(
            f"no output error for {len(hidden)} linears, because their calls cannot be observed: {some(hidden)}"
        )
    if untouched:
        notes.append(
            f"no output error for {len(untouched)} linears, because no token of layer_errors.samples reached them: "
            f"{some(untouched)}"
        )
    return notes


def _worse_than_rounding(rows: Sequence[Row], metrics: dict[str, float]) -> list[str]:
    """Compare the linears with rounding to nearest in their own grids, on samples that were held back.

    Sets `rounding_ratio`, the mean of error over error of rounding, and `worse_than_rounding`, the number above 1.
    """
    ratios = {
        str(row["name"]): float(row["held_error"]) / float(row["rounding_error"])
        for row in rows
        if row.get("held_error") is not None and row["rounding_error"]
    }
    if not ratios:
        return []
    metrics["rounding_ratio"] = fmean(ratios.values())
    worse = sorted((name for name, ratio in ratios.items() if ratio > 1), key=lambda name: -ratios[name])
    metrics["worse_than_rounding"] = len(worse)
    if not worse:
        return []
    named = some([f"{name} {ratios[name]:.3g}" for name in worse], _WORST)
    fact = (
        f"{len(worse)} of {len(ratios)} linears are further from the float model than rounding to nearest, on samples that "
        f"were held back ({named} times as far)"
    )
    if metrics["rounding_ratio"] <= 1:
        return [f"{fact}; over all linears the method is better, {metrics['rounding_ratio']:.3g} times as far"]
    return [
        f"{fact}; over all linears it is {metrics['rounding_ratio']:.3g} times as far: take method=rtn, or text that suits "
        "the model (calibration=auto) and more of it (calibration.n_samples)"
    ]


def _write(rows: Sequence[Row], folder: Path, title: str) -> list[str]:
    """Write the table, and the heat map if there is one; return their names relative to the folder."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    # This table is part of the stage's output, which must be reproducible. Times are only in the result's table.
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _TIMES]
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return [TABLE, PLOT] if heat_map.draw(rows, folder / PLOT, title) else [TABLE]
