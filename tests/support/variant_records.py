"""Results as the stages write them, for four variants: one that vLLM refuses, and the float baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantline.pipeline.records import VariantRecord
from quantline.pipeline.stages import PIPELINE as STAGES

FLOAT_NLL = 3.0612
REFUSED = "vLLM 0.32.0 on CPU serves GPTQ of 4 bits only, this variant has 8; convert.target=gptq cannot change that"
COMMIT = "5f1d2c7e9a0b4c3d8e6f7a1b2c3d4e5f60718293"


def _sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def config(name: str, method: str, bits: int) -> dict[str, Any]:
    backend = {"awq": "autoawq", "gptq": "auto_gptq", "float": "none"}[method]
    return {
        "variant": name, "bits": bits, "group_size": 128, "seed": 0, "threads": 2, "device": "auto",
        "model": {"name": "demo", "repo": None, "revision": None, "path": "assets/demo-llama", "allow_pickle": False},
        "method": {"name": method, "sym": True, "desc_act": False}, "backend": backend,
        "calibration": {"name": "demo", "n_samples": 32, "seq_len": 512, "seed": 0, "sources": {"tales": {"weight": 1.0}}},
        "serve": {
            "runtime": "vllm", "max_model_len": 512, "process": {"port": None, "kv_cache_gib": 1.0},
            "smoke": {"prompts": ["Once upon a time", "The answer is"], "max_tokens": 16},
        },
        "evaluate": {"documents": 64, "seq_len": 512, "tolerance": 0.02},
        "tracking": {"enabled": True, "uri": None, "experiment": None, "timeout_seconds": 10},
        "toolchains": {"autoawq": None, "vllm": None},
        "frozen": {"variant": name, "overrides": f"method={method} bits={bits}", "backends": [backend],
                   "locks": {backend: _sha(backend)}},
    }  # fmt: skip


def _metrics(stage: str, bits: int, worse: float) -> dict[str, float]:
    size = 4_812_800 * bits // 16 + 1_300_000
    match stage:
        case "quantize":
            return {
                "probe_max_difference": 2.4e-6, "linears_quantized": 14, "linears_expected": 14,
                "quantize_seconds": 5.75 + 10 * worse,
            }  # fmt: skip
        case "serve_smoke":
            return {
                "load_seconds": 31.4 + bits, "time_to_first_token_seconds": 0.0412, "latency_seconds": 0.38,
                "output_tokens_per_second": 212.5 - 4 * bits, "rss_bytes": 1_610_612_736,
            }  # fmt: skip
        case "speed":
            return {
                "output_tokens_per_second_c1": 240.0 - 5 * bits, "speed_up_c1": 1.4 - bits / 50, "ttft_ms_c1": 41.0,
                "weights_memory_bytes": size, "float_weights_memory_bytes": 6_112_800, "slower_than_float": 0.0,
            }  # fmt: skip
        case "evaluate":
            ratio = 2.718281828459045**worse
            return {
                "reference_perplexity": 21.3532 * ratio, "reference_nll": FLOAT_NLL + worse,
                "vllm_perplexity": 21.3549 * ratio, "perplexity_difference": 21.3532 * (ratio - 1),
                "perplexity_ratio": ratio, "nll_difference": worse, "nll_difference_low": worse * 0.8,
                "nll_difference_high": worse * 1.25, "engine_relative_difference": 8e-5, "size_bytes": size,
                "float_size_bytes": 6_112_800, "compression_ratio": 6_112_800 / size, "tokens_scored": 32704,
                "documents": 64,
            }  # fmt: skip
        case "tasks":
            return {"task/last_word/reference": 0.42, "recovery/last_word/reference": 0.98}
    return {"files": 7, "bytes": 6_112_800 + len(stage)}


def result(stage: str, name: str, bits: int, worse: float, **changes: Any) -> dict[str, Any]:
    seconds = {"download": 0.4, "calibrate": 1.2, "quantize": 17.8, "serve_smoke": 48.5, "evaluate": 22.0}.get(
        stage, 2.1
    )
    return {
        "schema": 1, "stage": stage, "variant": name, "fingerprint": _sha(stage, name, bits), "status": "ok", "reason": None,
        "metrics": _metrics(stage, bits, worse), "inputs": {"model": _sha("model")},
        "outputs": {"model.safetensors": _sha(stage, name, bits, worse)}, "timings": {"total_seconds": seconds},
        "peak_memory_bytes": 912_000_000,
        "environment": {
            "toolchain": "vllm" if stage == "serve_smoke" else "reference", "lock_sha256": _sha("lock"), "device": "cpu",
            "threads": 2, "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
        },
        "warnings": [], "files": [f"{stage}/worker.log"], **changes,
    }  # fmt: skip


def record(
    name: str, method: str, bits: int, worse: float, folder: Path, *, stages: Sequence[str] = STAGES
) -> VariantRecord:
    for stage in stages:
        log = folder / name / stage / "worker.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{stage} of {name}\n", encoding="utf-8")
    results = [result(stage, "shared" if stage == "download" else name, bits, worse) for stage in stages]
    overrides = f"method={method} bits={bits}"
    return VariantRecord(name, config(name, method, bits), overrides, results, folder / name, COMMIT, False)


def four(folder: Path) -> list[VariantRecord]:
    return list(_four(folder))


def _four(folder: Path) -> Iterator[VariantRecord]:
    yield record("float", "float", 16, 0.0, folder, stages=("download", "serve_smoke", "evaluate"))
    yield record("awq-w4-g128", "awq", 4, 0.01231, folder)
    yield record("gptq-w4-g128", "gptq", 4, 0.01874, folder)
    refused = record("gptq-w8-g128", "gptq", 8, 0.00031, folder)
    for stage in refused.results:
        if stage["stage"] == "serve_smoke":
            stage.update(status="unsupported", reason=REFUSED, metrics={}, peak_memory_bytes=None)
        if stage["stage"] == "evaluate":
            del stage["metrics"]["vllm_perplexity"], stage["metrics"]["engine_relative_difference"]
    yield refused
