"""The work of the evaluate stage: score a checkpoint with the reference engine, and compare the scores with the float
baseline's and with the server's.

The output folder holds the windows, `reference.safetensors` (log-probabilities, likeliest tokens, divergences from the float
model), `documents.jsonl`, `comparison.json` and, if they are measured, `generations.json`, `layer_errors.csv`,
`restored.csv`, `state_errors.csv`, `positions.csv` and `groups.csv`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import BootstrapConfig, EvaluateConfig
from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.core.text import percent
from quantline.data.windows import Windows, save_windows
from quantline.evaluation import generations, groups, perplexity, positions, sensitivity, thresholds
from quantline.evaluation.bootstrap import bootstrap, caution
from quantline.evaluation.measurements import Measurement, MeasurementOptions, WorkerRequest, plan
from quantline.evaluation.perplexity import DocumentScore
from quantline.toolchains.protocol import JobResult

ENGINE = "reference: weights dequantized to float32, no quantized kernels"


@dataclass(frozen=True)
class Inputs:
    """The folders that an evaluation reads.

    Attributes:
        checkpoint: the checkpoint to evaluate.
        float_model: the model that it was quantized from.
        served: the output of serve_smoke.
        baseline: the float model's output of this stage; None if `checkpoint` is the float model, which is then compared
            with itself.
    """

    checkpoint: Path
    float_model: Path
    served: Path
    baseline: Path | None


@dataclass(frozen=True)
class Verdict:
    """The result of an evaluation.

    Attributes:
        metrics: numbers by name.
        verdict: whether the variant is "better", "worse" or the "same" as the baseline on this text.
        tables: rows by table, for the stage's result.
        files: written files, relative to the output.
        notes: sentences for the user.
    """

    metrics: dict[str, float]
    verdict: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Scores:
    """One model's scores on the windows: losses by document, and what the engine kept per position, by name."""

    documents: list[DocumentScore]
    places: Mapping[str, NDArray[Any]]


def evaluate(
    inputs: Inputs,
    windows: Windows,
    options: EvaluateConfig,
    *,
    device: str,
    threads: int,
    out: Path,
    run_worker: Callable[[str, str, dict[str, Any], str], JobResult],
    instruments: MeasurementOptions = MeasurementOptions(),  # noqa: B008  # frozen
) -> Verdict:
    """Score the checkpoint, compare it, and write the results.

    Args:
        inputs: the checkpoint and the folders to compare it with.
        windows: the tokens to score.
        options: only the bootstrap, `engine_tolerance` and `batch_tokens` are used; other measurements and limits are in
            `instruments`.
        device, threads: of the worker.
        out: an empty folder.
        run_worker: (toolchain, module, job, label) -> the worker's result.
        instruments: the measurements besides perplexity.

    Raises:
        QuantlineError: the server's perplexity differs from the reference engine's by more than `engine_tolerance`, or
            an alarm of `fail_on` was raised.
        UserError: the baseline was scored on other text.
    """
    how, is_baseline = options.bootstrap, inputs.baseline is None
    scores = out / "reference.safetensors"
    with tempfile.TemporaryDirectory(prefix="quantline-evaluate-") as work:
        parts = plan(
            instruments, windows, baseline=not is_baseline, float_model=inputs.float_model, served=inputs.served,
            work=Path(work),
        )  # fmt: skip
        job = {
            "checkpoint": str(inputs.checkpoint), "windows": str(save_windows(windows, out)), "output": str(scores),
            "device": device, "threads": threads, "batch_tokens": options.batch_tokens,
            "gpus": options.gpus, **parts.job,
        }  # fmt: skip
        worker = run_worker("reference", "quantline.toolchains.workers.reference.evaluate", job, "reference engine")
        own = _scores(scores, windows)
        base = own if inputs.baseline is None else _baseline(inputs.baseline, windows)
        restored = _restored(parts, worker, base, how)
    level = str(windows.protocol.get("level", "token"))
    units = (own.documents, base.documents)
    if level == "word":
        units = (perplexity.in_words(own.documents, windows), perplexity.in_words(base.documents, windows))
    comparison = perplexity.compare(*units, how)
    from_server = perplexity.load_server_scores(inputs.served, windows)
    vllm = None if from_server is None else perplexity.document_nlls(windows, from_server)
    if vllm is not None:
        perplexity.check_engines(perplexity.relative_difference(own.documents, vllm), options.engine_tolerance)
    metrics = perplexity.evaluation_metrics(
        reference=own.documents, comparison=comparison, vllm=vllm, windows=windows,
        size_bytes=perplexity.weight_bytes(inputs.checkpoint),
        float_size_bytes=perplexity.weight_bytes(inputs.float_model),
    )  # fmt: skip
    sections = {
        "kl": _divergence(windows, own, how, is_baseline=is_baseline), "top1": _agreement(windows, own, base, how),
        "generations": _generations(parts, worker, inputs.baseline, instruments, out),
        "noise": _noise(instruments),
    }  # fmt: skip
    layers, states = _layers(parts, worker, restored, out), _states(worker, out)
    ranges, by_group = _positions(windows, own, base, how, out), _groups(own, base, comparison.high, how, out)
    for found in (*sections.values(), layers, states, ranges, by_group):
        metrics.update(found.metrics)
    notes = [*sections["generations"].notes, *layers.notes, *by_group.notes]
    if not is_baseline and instruments.divergence != 0 and not parts.rows:
        notes.append("errors of single linears are not measured: the quantize stage's table of them is missing")
    if not is_baseline and (few := caution(len(own.documents))):
        notes.append(few)
    if instruments.changed_files is not None:
        metrics["changed_files"] = float(instruments.changed_files)
    # By token, whatever the protocol's level: a limit by word would depend on the length of words.
    increase = perplexity.relative_difference(base.documents, own.documents)
    flags = thresholds.raised({**metrics, "perplexity_increase": increase}, instruments.limits)
    metrics["alarms"] = float(len(flags))
    notes += [f"alarm: {flag.message}" for flag in flags]
    thresholds.refuse(flags, instruments.fail_on)
    perplexity.write_documents(out / "documents.jsonl", own.documents, vllm)
    document = {
        **asdict(comparison), "level": how.level, "seed": how.seed, "resamples": how.resamples,
        "protocol": _protocol(windows, level), **{name: found.section for name, found in sections.items()},
        "flags": thresholds.rows(flags),
    }  # fmt: skip
    write_json(out / "comparison.json", document)
    metrics["reference_tokens_per_second"] = float(worker.data["tokens_per_second"])
    tables = {**layers.tables, **states.tables, **ranges.tables, **by_group.tables, "flags": thresholds.rows(flags)}
    files = ["documents.jsonl", "comparison.json", *layers.files, *states.files, *ranges.files, *by_group.files]
    return Verdict(metrics, comparison.verdict, tables, files, notes)


def _scores(path: Path, windows: Windows) -> _Scores:
    places = perplexity.load_scores(path)
    return _Scores(perplexity.document_nlls(windows, places["logprobs"]), places)


def _baseline(folder: Path, windows: Windows) -> _Scores:
    documents = perplexity.read_documents(folder / "documents.jsonl")[0]
    if [score.id for score in documents] != list(windows.document_ids):
        raise UserError(f"{folder}: the float model was scored on other documents; evaluate the float model again")
    return _Scores(documents, perplexity.load_scores(folder / "reference.safetensors"))


def _protocol(windows: Windows, level: str) -> dict[str, Any]:
    """The full protocol of the perplexity, with the counts of what was scored."""
    return {
        **windows.protocol, "level": level, "engine": ENGINE, "windows_sha256": windows.sha256,
        "documents": len(windows.document_ids), "windows": len(windows.document),
        "tokens_scored": int(windows.scored.sum()),
        "words_scored": None if windows.words is None else int(windows.words.sum()),
        "bytes_scored": None if windows.text_bytes is None else int(windows.text_bytes.sum()),
    }  # fmt: skip


def _interval(name: str, sums: NDArray[Any], tokens: NDArray[Any], how: BootstrapConfig) -> Measurement:
    found = bootstrap(sums, tokens, how)
    metrics = {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    return Measurement(metrics, asdict(found))


def _divergence(windows: Windows, own: _Scores, how: BootstrapConfig, *, is_baseline: bool) -> Measurement:
    """KL(float || variant). For the float model itself it is 0 and needs no second model."""
    found_kl = own.places.get("kl")
    if found_kl is None and not is_baseline:
        return Measurement()
    kl = np.zeros(len(windows.input_ids)) if found_kl is None else found_kl
    measured = ~np.isnan(kl)
    sums, tokens = perplexity.document_sums(windows, kl, measured)
    scored = kl[windows.scored & measured].astype(np.float64)
    found = _interval("kl_divergence", sums[tokens > 0], tokens[tokens > 0], how)
    section = {
        **(found.section or {}), "tokens": len(scored), "direction": "float || variant", "unit": "nats/token",
        "median": float(np.median(scored)), "p99": float(np.quantile(scored, 0.99)),
    }  # fmt: skip
    return Measurement(found.metrics, section)


def _agreement(windows: Windows, own: _Scores, base: _Scores, how: BootstrapConfig) -> Measurement:
    sums, tokens = perplexity.top1_matches(windows, own.places["top1"], base.places["top1"])
    return _interval("top1_agreement", sums, tokens, how)


def _generations(
    parts: WorkerRequest, worker: JobResult, baseline: Path | None, instruments: MeasurementOptions, out: Path
) -> Measurement:
    own, options = parts.served or worker.data.get("generations"), instruments.generations
    if own is None or options is None:
        return Measurement()
    prompts = [list(tokens) for tokens in parts.prompts.tokens]
    write_json(out / generations.FILE, {"documents": list(parts.prompts.documents), "prompts": prompts, **own})
    floats = own if baseline is None else generations.load_generations(baseline, parts.prompts)
    found = generations.compare_generations(parts.prompts.documents, own, floats, options.tie_margin)
    names = {"identical": "identical_generations", "first_divergence_median": "first_divergence_median"}
    metrics = {} if found["identical"] is None else {name: float(found[key]) for key, name in names.items()}
    engines = {"engine": generations.engine_of(own), "float_engine": generations.engine_of(floats)}
    notes = []
    if engines["engine"] != engines["float_engine"]:
        notes = [
            f"continuations are of {engines['engine']}, and the float model's of {engines['float_engine']}; where two "
            "tokens are nearly as likely, they may part for that reason alone"
        ]
    return Measurement(metrics, {"prompt_tokens": options.prompt_tokens, **engines, **found}, notes=notes)


def _noise(instruments: MeasurementOptions) -> Measurement:
    noise = instruments.noise
    if not noise:
        return Measurement()
    return Measurement({f"noise_{key}": float(noise[key]) for key in ("low", "high", "runs")}, dict(noise))


def _restored(parts: WorkerRequest, worker: JobResult, base: _Scores, how: BootstrapConfig) -> list[dict[str, Any]]:
    """The loss that each of the worst linears causes. Call it while the worker's temporary files exist."""
    from safetensors.numpy import load_file

    places = worker.data.get("restored")
    if not places or parts.part is None or parts.chosen is None or parts.restored is None:
        return []
    tensors = load_file(parts.restored)
    floats = np.array([score.nll_sum for score in base.documents])[parts.chosen]
    errors = {row["name"]: row["output_error"] for row in worker.data["errors"]}
    return sensitivity.shares(
        parts.part, places=places, logprobs=tensors["logprobs"], kl=tensors["kl"], floats=floats, how=how,
        rows=[{**row, "output_error": errors[row["name"]]} for row in parts.rows],
    )  # fmt: skip


def _layers(parts: WorkerRequest, worker: JobResult, restored: list[dict[str, Any]], out: Path) -> Measurement:
    """Metrics, tables, files and notes about single linears."""
    judged = worker.data.get("errors")
    if not judged:
        return Measurement()
    metrics: dict[str, float] = {}
    summary = sensitivity.summarize(parts.rows)
    sensitivity.write_table(out / sensitivity.SUMMARY, summary, list(summary[0]))
    tables, files, notes = {"layer_errors": summary}, [sensitivity.SUMMARY], []
    for key in ("output_error", "weight_error"):
        changed = sensitivity.changes(parts.rows, judged, key).values()
        if changed:  # a change that is not a number counts as the largest
            metrics[f"{key}_change"] = max(changed, key=lambda change: change if math.isfinite(change) else math.inf)
    if (ratio := sensitivity.rounding_ratio(parts.rows)) is not None:
        metrics["rounding_ratio"] = ratio
    if (apart := sensitivity.outlier(parts.rows, judged)) is not None:
        metrics["output_error_outlier"] = apart[1]
    if restored:
        sensitivity.write_table(out / sensitivity.RESTORED, restored, sensitivity.RESTORED_COLUMNS)
        tables["restored"], files = restored, [*files, sensitivity.RESTORED]
        known = [row["recovered_kl_share"] for row in restored if row["recovered_kl_share"] is not None]
        if known:
            metrics["restored_share_max"], metrics["restored_share_sum"] = max(known), sum(known)
        notes.append("linears with the largest output errors: " + ", ".join(_share(row) for row in restored))
    return Measurement(metrics, None, tables, files, notes)


def _states(worker: JobResult, out: Path) -> Measurement:
    """How far the hidden states are from the float model's, after each part of the model."""
    rows = [row for row in worker.data.get("states", ()) if row["state_error"] is not None]
    if not rows:
        return Measurement()
    sensitivity.write_table(out / sensitivity.STATES, rows, ["name", "state_error"])
    return Measurement({"state_error": rows[-1]["state_error"]}, None, {"states": rows}, [sensitivity.STATES])


def _positions(windows: Windows, own: _Scores, base: _Scores, how: BootstrapConfig, out: Path) -> Measurement:
    """The loss by the length of the context; the metric is that of the longest contexts."""
    rows = positions.by_position(windows, own.places["logprobs"], base.places["logprobs"], how)
    if not rows or own is base:
        return Measurement()
    sensitivity.write_table(out / positions.TABLE, rows, positions.COLUMNS)
    last = rows[-1]["nll_difference"]
    assert last is not None
    return Measurement({"nll_difference_far": last}, None, {"positions": rows}, [positions.TABLE])


def _groups(own: _Scores, base: _Scores, high: float, how: BootstrapConfig, out: Path) -> Measurement:
    """The loss by group of documents; the metrics are those of the worst one. high: upper end of the whole's, in nats."""
    rows = [] if own is base else groups.by_group(own.documents, base.documents, how)
    if (found := groups.worst(rows)) is None:
        return Measurement()
    sensitivity.write_table(out / groups.TABLE, rows, groups.COLUMNS)
    metrics = {f"worst_group_{key}": float(found[f"nll_{key}"]) for key in ("difference", "low", "high")}
    said = groups.note(found, high)
    return Measurement(metrics, None, {"groups": rows}, [groups.TABLE], [said] if said else [])


def _share(row: dict[str, Any]) -> str:
    if row["recovered_kl_share"] is None:
        return f"{row['name']} ({row['note'] or 'nothing to recover'})"
    share = round(row["recovered_kl_share"], 2) + 0.0  # no -0
    return f"{row['name']} ({percent(share, 0)} of the divergence)"
