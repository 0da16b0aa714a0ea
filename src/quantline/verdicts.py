"""The evaluate stage's work: score a checkpoint by the reference engine, compare it with the float baseline and
with what the server made of it.

The output folder holds the windows, `reference.safetensors` (log-probabilities and likeliest tokens), `documents.jsonl` and
`comparison.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantline import evaluation
from quantline.jobs import JobResult, write_json
from quantline.windows import Windows, save_windows


@dataclass(frozen=True)
class Bootstrap:
    """How the interval of the difference is made."""

    resamples: int
    level: float
    seed: int


@dataclass(frozen=True)
class Verdict:
    """The metrics, and whether the variant is better, worse or the same as the baseline on this text."""

    metrics: dict[str, float]
    verdict: str


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
) -> Verdict:
    """Score, compare, write.

    baseline: the float model's output of this stage; None where `checkpoint` is the float model, which is then compared with
    itself. served: the output of serve_smoke.

    Raises:
        QuantlineError: the server's perplexity is farther from the reference engine's than `engine_tolerance`.
        UserError: the baseline was scored on other text.
    """
    path = save_windows(windows, out)
    scores = out / "reference.safetensors"
    job = {
        "kind": "score", "checkpoint": str(checkpoint), "windows": str(path), "output": str(scores), "device": device,
        "threads": threads, "batch_tokens": batch_tokens,
    }  # fmt: skip
    worker = run_worker("reference", "quantline.reference", job, "reference engine")
    logprobs, top1 = evaluation.load_scores(scores)
    reference = evaluation.document_nlls(windows, logprobs)
    from_server = evaluation.load_server_scores(served, windows)
    vllm = None if from_server is None else evaluation.document_nlls(windows, from_server)
    base, base_top1 = reference, top1
    if baseline is not None:
        base = evaluation.read_documents(baseline / "documents.jsonl")[0]
        base_top1 = evaluation.load_scores(baseline / "reference.safetensors")[1]
    comparison = evaluation.compare(
        reference, base, seed=bootstrap.seed, resamples=bootstrap.resamples, level=bootstrap.level
    )
    metrics = evaluation.evaluation_metrics(
        reference=reference, comparison=comparison, vllm=vllm, size_bytes=evaluation.weight_bytes(checkpoint),
        float_size_bytes=evaluation.weight_bytes(float_model),
        top1=evaluation.top1_agreement(windows, top1, base_top1),
    )  # fmt: skip
    if vllm is not None:
        evaluation.check_engines(evaluation.engine_agreement(reference, vllm), engine_tolerance)
    evaluation.write_documents(out / "documents.jsonl", reference, vllm)
    write_json(out / "comparison.json", {**asdict(comparison), "level": bootstrap.level})
    metrics["reference_tokens_per_second"] = float(worker.data["tokens_per_second"])
    return Verdict(metrics, comparison.verdict)
