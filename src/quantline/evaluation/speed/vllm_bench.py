"""The arguments of vLLM's benchmark tools, and how to read their JSON.

`serve` sends random prompts to a server, `latency` and `throughput` load the model themselves. They are part of vLLM:
https://docs.vllm.ai/en/latest/benchmarking/cli/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.speed import LevelConfig, SpeedConfig
from quantline.core.errors import ServerError
from quantline.serving.command import SERVED_NAME, TEXT_ONLY, ServerOptions
from quantline.serving.keeping import Keeping

# Our name -> name in the JSON that `vllm bench serve` saves.
_COLUMNS = {
    "output_tokens_per_second": "output_throughput",
    "request_throughput": "request_throughput",
    "ttft_ms_median": "median_ttft_ms",
    "ttft_ms_p99": "p99_ttft_ms",
    "itl_ms_median": "median_itl_ms",
    "itl_ms_p99": "p99_itl_ms",
    "tpot_ms_median": "median_tpot_ms",
    "latency_ms_median": "median_e2el_ms",
    "duration_seconds": "duration",
}
MEASURED = tuple(_COLUMNS)


@dataclass(frozen=True)
class Subject:
    """A model to measure: `float` or `variant`, its checkpoint, how it is served, and how its server is shared."""

    model: str
    checkpoint: Path
    options: ServerOptions
    keeping: Keeping | None = None


def serve_arguments(subject: Subject, url: str, level: LevelConfig, plan: SpeedConfig, result: Path) -> list[str]:
    """The arguments of `vllm bench serve` against a running server."""
    return [
        "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
        "--model", SERVED_NAME, "--tokenizer", str(subject.checkpoint), "--dataset-name", "random",
        "--random-input-len", str(plan.input_tokens), "--random-output-len", str(plan.output_tokens),
        "--num-prompts", str(level.prompts), "--max-concurrency", str(level.concurrency),
        "--num-warmups", str(plan.warmup_waves * level.concurrency), "--seed", str(plan.seed), "--ignore-eos",
        "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99",
        "--disable-tqdm", "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


def serve_row(result: Mapping[str, Any], model: str, level: LevelConfig, plan: SpeedConfig) -> dict[str, Any]:
    """The row of one run of `vllm bench serve`.

    Raises:
        ServerError: requests failed, or answers were too short.
    """
    completed, tokens = int(result.get("completed") or 0), int(result.get("total_output_tokens") or 0)
    if completed != level.prompts or tokens != level.prompts * plan.output_tokens:
        raise ServerError(
            f"vllm bench serve: {completed} of {level.prompts} requests were answered, with {tokens} tokens, but "
            f"{level.prompts * plan.output_tokens} were asked for ({model}, {level.concurrency} at a time); see the log"
        )
    missing = [name for name in _COLUMNS.values() if name not in result]
    if missing:
        raise ServerError(
            f"vllm bench serve: its result has no {', '.join(missing)}; this version of vLLM uses other names"
        )
    measured = {ours: float(result[theirs]) for ours, theirs in _COLUMNS.items()}
    return {"model": model, "concurrency": level.concurrency, "prompts": level.prompts, **measured}


def offline_arguments(tool: str, subject: Subject, level: LevelConfig, plan: SpeedConfig, result: Path) -> list[str]:
    """The arguments of `vllm bench latency` (a batch of `concurrency`) or `vllm bench throughput` (all prompts)."""
    options = subject.options
    common = [
        "--model", str(subject.checkpoint), "--dtype", options.dtype, "--seed", str(plan.seed),
        "--tensor-parallel-size", str(options.process.tensor_parallel_size), "--output-json", str(result),
        "--input-len", str(plan.input_tokens), "--output-len", str(plan.output_tokens), "--no-enable-prefix-caching",
    ]  # fmt: skip
    if options.max_model_len is not None:
        common += ["--max-model-len", str(options.max_model_len)]
    if options.process.kv_cache_gib is not None:
        common += ["--kv-cache-memory-bytes", str(int(options.process.kv_cache_gib * 1024**3))]
    if options.kv_cache_dtype != "auto":
        common += ["--kv-cache-dtype", options.kv_cache_dtype]
    if options.device == "cuda":
        common += ["--gpu-memory-utilization", str(options.process.gpu_memory_utilization)]
    if options.enforce_eager:
        common.append("--enforce-eager")
    if options.text_only:
        common.append(TEXT_ONLY)
    if tool == "latency":
        iterations = ["--num-iters-warmup", str(max(1, plan.warmup_waves)), "--num-iters", str(2 * plan.rounds)]
        return ["bench", tool, *common, "--batch-size", str(level.concurrency), *iterations]
    prompts = ["--num-prompts", str(level.prompts), "--max-num-seqs", str(level.concurrency)]
    return ["bench", tool, *common, "--dataset-name", "random", *prompts]


def offline_row(
    tool: str, result: Mapping[str, Any], model: str, level: LevelConfig, plan: SpeedConfig
) -> dict[str, Any]:
    """The row of one `vllm bench latency` or `throughput`: output tokens per second, and seconds per batch or in all."""
    if tool == "latency":
        seconds = float(result["avg_latency"])
        times = [float(value) for value in result["latencies"]]
        tokens = level.concurrency * plan.output_tokens
        spread = {"seconds_low": min(times), "seconds_high": max(times)}
    else:
        seconds, tokens, spread = float(result["elapsed_time"]), level.prompts * plan.output_tokens, {}
    return {
        "tool": tool, "model": model, "concurrency": level.concurrency, "seconds": seconds, **spread,
        "output_tokens_per_second": tokens / seconds,
    }  # fmt: skip
