"""The evaluate stage's work: score a checkpoint by the reference engine, compare it with the float baseline and
with what the server made of it, and look at it with the other instruments.

The output folder holds the windows, `reference.safetensors` (log-probabilities, likeliest tokens, divergences from the float
model), `documents.jsonl`, `comparison.json` and, as far as they are measured, `generations.json`, `layer_errors.csv` and
`restored.csv`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.data.windows import Windows, save_windows
from quantline.evaluation import bootstrap as statistics
from quantline.evaluation import generations, perplexity, sensitivity, thresholds
from quantline.evaluation.bootstrap import Bootstrap
from quantline.evaluation.measurements import Instruments, Plan, plan
from quantline.evaluation.perplexity import DocumentScore
from quantline.toolchains.protocol import JobResult

ENGINE = "reference: weights dequantized to float32, no quantized kernels"


@dataclass(frozen=True)
class Verdict:
    """The metrics, whether the variant is better, worse or the same as the baseline on this text, and the rest of it.

    tables: rows by name, for the stage's result. files: written ones, relative to the output. notes: what is worth saying.
    """

    metrics: dict[str, float]
    verdict: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Scores:
    """Of one model on the windows: by document the loss, the likeliest tokens, and the divergence from the float model."""

    documents: list[DocumentScore]
    top1: NDArray[np.int32]
    kl: NDArray[np.float32] | None


def evaluate(
    *,
    checkpoint: Path,
    windows: Windows,
    served: Path,
    baseline: Path | None,
    float_model: Path,
    bootstrap: Bootstrap,
    engine_tolerance: float,
    batch_tokens: int,
    device: str,
    threads: int,
    out: Path,
    run_worker: Callable[[str, str, dict[str, Any], str], JobResult],
    instruments: Instruments = Instruments(),  # noqa: B008  # frozen
) -> Verdict:
    """Score, compare, write.

    baseline: the float model's output of this stage; None where `checkpoint` is the float model, which is then compared with
    itself. served: the output of serve_smoke.

    Raises:
        QuantlineError: the server's perplexity is farther from the reference engine's than `engine_tolerance`, or an
            instrument that should fail raised an alarm.
        UserError: the baseline was scored on other text.
    """
    scores = out / "reference.safetensors"
    with tempfile.TemporaryDirectory(prefix="quantline-evaluate-") as work:
        parts = plan(
            instruments, windows, baseline=baseline is not None, float_model=float_model, work=Path(work)
        )  # fmt: skip
        job = {
            "checkpoint": str(checkpoint), "windows": str(save_windows(windows, out)), "output": str(scores),
            "device": device, "threads": threads, "batch_tokens": batch_tokens, **parts.job,
        }  # fmt: skip
        worker = run_worker("reference", "quantline.toolchains.workers.reference.evaluate", job, "reference engine")
        own = _scores(scores, windows)
        base = own if baseline is None else _baseline(baseline, windows)
        restored = _restored(parts=parts, worker=worker, base=base, how=bootstrap)
    level = str(windows.protocol.get("level", "token"))
    units = (own.documents, base.documents)
    if level == "word":
        units = (perplexity.in_words(own.documents, windows), perplexity.in_words(base.documents, windows))
    comparison = perplexity.compare(*units, **asdict(bootstrap))
    from_server = perplexity.load_server_scores(served, windows)
    vllm = None if from_server is None else perplexity.document_nlls(windows, from_server)
    if vllm is not None:
        perplexity.check_engines(perplexity.relative_difference(own.documents, vllm), engine_tolerance)
    metrics = perplexity.evaluation_metrics(
        reference=own.documents, comparison=comparison, vllm=vllm, size_bytes=perplexity.weight_bytes(checkpoint),
        float_size_bytes=perplexity.weight_bytes(float_model), windows=windows,
    )  # fmt: skip
    sections: dict[str, Any] = {"kl": None, "generations": None, "noise": instruments.noise and dict(instruments.noise)}
    sections["kl"] = _divergence(metrics, windows, own, bootstrap, is_baseline=baseline is None)
    sections["top1"] = _agreement(metrics, windows, own, base, bootstrap)
    sections["generations"] = _generations(
        metrics, parts=parts, worker=worker, baseline=baseline, out=out, wish=instruments
    )
    tables, files, notes = _layers(metrics, parts, worker, restored, out)
    if instruments.noise:
        metrics.update({f"noise_{key}": float(instruments.noise[key]) for key in ("low", "high", "runs")})
    if baseline is not None and instruments.divergence != 0 and not parts.rows:
        notes.append(
            "errors of single linears: the quantize stage's are not here, so the loss is not told apart by linear"
        )
    if instruments.changed_files is not None:
        metrics["changed_files"] = float(instruments.changed_files)
    # By token, whatever the protocol's level: a limit by word would depend on how long words are.
    increase = perplexity.relative_difference(base.documents, own.documents)
    flags = thresholds.raised({**metrics, "perplexity_increase": increase}, instruments.limits)
    metrics["alarms"] = float(len(flags))
    notes += [f"alarm: {flag.message}" for flag in flags]
    thresholds.refuse(flags, instruments.fail_on)
    perplexity.write_documents(out / "documents.jsonl", own.documents, vllm)
    document = {
        **asdict(comparison), "level": bootstrap.level, "seed": bootstrap.seed, "resamples": bootstrap.resamples,
        "protocol": _protocol(windows, level), **sections, "flags": thresholds.rows(flags),
    }  # fmt: skip
    write_json(out / "comparison.json", document)
    metrics["reference_tokens_per_second"] = float(worker.data["tokens_per_second"])
    tables["flags"] = thresholds.rows(flags)
    return Verdict(metrics, comparison.verdict, tables, ["documents.jsonl", "comparison.json", *files], notes)


def _scores(path: Path, windows: Windows) -> _Scores:
    logprobs, top1, kl = perplexity.load_scores(path)
    return _Scores(perplexity.document_nlls(windows, logprobs), top1, kl)


def _baseline(folder: Path, windows: Windows) -> _Scores:
    documents = perplexity.read_documents(folder / "documents.jsonl")[0]
    if [score.id for score in documents] != list(windows.document_ids):
        raise UserError(f"{folder}: the float model was scored on other documents; evaluate it again")
    return _Scores(documents, perplexity.load_scores(folder / "reference.safetensors")[1], None)


def _protocol(windows: Windows, level: str) -> dict[str, Any]:
    """The flavour of perplexity in full, with what it came to on this text."""
    return {
        **windows.protocol, "level": level, "engine": ENGINE, "windows_sha256": windows.sha256,
        "documents": len(windows.document_ids), "windows": len(windows.document),
        "tokens_scored": int(windows.scored.sum()),
        "words_scored": None if windows.words is None else int(windows.words.sum()),
        "bytes_scored": None if windows.text_bytes is None else int(windows.text_bytes.sum()),
    }  # fmt: skip


def _interval(
    metrics: dict[str, float], name: str, sums: NDArray[Any], tokens: NDArray[Any], how: Bootstrap
) -> dict[str, Any]:
    found = statistics.bootstrap(sums, tokens, **asdict(how))
    metrics.update({name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high})
    return asdict(found)


def _divergence(
    metrics: dict[str, float], windows: Windows, own: _Scores, how: Bootstrap, *, is_baseline: bool
) -> dict[str, Any] | None:
    """KL(float || variant); of the float model from itself it is 0, and needs no second model to say so."""
    if own.kl is None and not is_baseline:
        return None
    kl = np.zeros(len(windows.input_ids)) if own.kl is None else own.kl
    measured = ~np.isnan(kl)
    sums, tokens = perplexity.document_sums(windows, kl, measured)
    scored = kl[windows.scored & measured].astype(np.float64)
    found = {**_interval(metrics, "kl_divergence", sums[tokens > 0], tokens[tokens > 0], how), "tokens": len(scored)}
    found["direction"] = "float || variant"
    return {**found, "unit": "nats/token", "median": float(np.median(scored)), "p99": float(np.quantile(scored, 0.99))}


def _agreement(
    metrics: dict[str, float], windows: Windows, own: _Scores, base: _Scores, how: Bootstrap
) -> dict[str, Any]:
    sums, tokens = perplexity.top1_matches(windows, own.top1, base.top1)
    return _interval(metrics, "top1_agreement", sums, tokens, how)


def _generations(
    metrics: dict[str, float], *, parts: Plan, worker: JobResult, baseline: Path | None, out: Path, wish: Instruments
) -> dict[str, Any] | None:
    own = worker.data.get("generations")
    if own is None or wish.generations is None:
        return None
    prompts = [list(tokens) for tokens in parts.prompts.tokens]
    write_json(out / generations.FILE, {"documents": list(parts.prompts.documents), "prompts": prompts, **own})
    floats = own if baseline is None else generations.load_generations(baseline, parts.prompts)
    found = generations.compare_generations(
        parts.prompts.documents, own, floats, wish.generations.tie_margin
    )  # fmt: skip
    if found["identical"] is not None:
        metrics["identical_generations"] = float(found["identical"])
        metrics["first_divergence_median"] = float(found["first_divergence_median"])
    return {"prompt_tokens": wish.generations.prompt_tokens, **found}


def _restored(*, parts: Plan, worker: JobResult, base: _Scores, how: Bootstrap) -> list[dict[str, Any]]:
    """What each of the worst linears costs: read while the worker's files are there."""
    from safetensors.numpy import load_file

    places = worker.data.get("restored")
    if not places or parts.part is None or parts.chosen is None or parts.restored is None:
        return []
    tensors = load_file(parts.restored)
    floats = np.array([score.nll_sum for score in base.documents])[parts.chosen]
    errors = {row["name"]: row["output_error"] for row in worker.data["errors"]}
    return sensitivity.shares(
        parts.part, places=places, logprobs=tensors["logprobs"], kl=tensors["kl"], floats=floats, **asdict(how),
        rows=[{**row, "output_error": errors[row["name"]]} for row in parts.rows],
    )  # fmt: skip


def _layers(
    metrics: dict[str, float], parts: Plan, worker: JobResult, restored: list[dict[str, Any]], out: Path
) -> tuple[dict[str, list[dict[str, Any]]], list[str], list[str]]:
    """Tables, files and notes on single linears."""
    judged = worker.data.get("errors")
    if not judged:
        return {}, [], []
    summary = sensitivity.summarize(parts.rows)
    sensitivity.write_table(out / sensitivity.SUMMARY, summary, list(summary[0]))
    tables, files, notes = {"layer_errors": summary}, [sensitivity.SUMMARY], []
    for key in ("output_error", "weight_error"):
        changed = sensitivity.changes(parts.rows, judged, key).values()
        if changed:  # no number is worse than any
            metrics[f"{key}_change"] = max(changed, key=lambda change: change if math.isfinite(change) else math.inf)
    if (apart := sensitivity.outlier(parts.rows, judged)) is not None:
        metrics["output_error_outlier"] = apart[1]
    if restored:
        sensitivity.write_table(out / sensitivity.RESTORED, restored, sensitivity.RESTORED_COLUMNS)
        tables["restored"], files = restored, [*files, sensitivity.RESTORED]
        told = [row["recovered_kl_share"] for row in restored if row["recovered_kl_share"] is not None]
        if told:
            metrics["restored_share_max"], metrics["restored_share_sum"] = max(told), sum(told)
        notes.append("worst linears: " + ", ".join(_share(row) for row in restored))
    return tables, files, notes


def _share(row: dict[str, Any]) -> str:
    if row["recovered_kl_share"] is None:
        return f"{row['name']} ({row['note'] or 'nothing to recover'})"
    return f"{row['name']} ({row['recovered_kl_share']:.0%} of the divergence)"
