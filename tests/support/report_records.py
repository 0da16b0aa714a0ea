"""Results and files of a whole pipeline, as its stages write them, for the report."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer import Composer
from variant_records import REFUSED, config, result

from quantline.pipeline.chosen import keep
from quantline.pipeline.records import VariantRecord

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip
# name: method, bits, growth of the perplexity in per cent with its interval, MB, worst error, speed-up at 1 / 8 / 64
VARIANTS: dict[str, tuple[str, int, tuple[float, float, float], float, float, tuple[float, float, float] | None]] = {
    "awq-w4-g128": ("awq", 4, (2.46, 2.28, 2.65), 7.26, 0.138, (1.31, 1.12, 0.88)),
    "gptq-w4-g128": ("gptq", 4, (2.21, 2.04, 2.37), 7.33, 0.121, (1.34, 1.17, 0.93)),
    "gptq-w8-g128": ("gptq", 8, (0.006, -0.003, 0.015), 11.3, 0.007, None),
    "gptq-w3-g128": ("gptq", 3, (12.18, 11.7, 12.66), 6.3, 0.31, (1.36, 1.21, 0.97)),
    "gptq-w2-g128": ("gptq", 2, (162.2, 156.7, 168.0), 5.3, 0.78, (1.39, 1.22, 1.01)),
}
FLOAT_BYTES = 18.9e6
composed = Composer(Path(__file__).parents[2] / "conf")


def monitor(seconds: float, peak: float, *, gpu: bool = False) -> dict[str, Any]:
    columns = ["seconds", "cpu_percent", "rss_bytes", "system_memory_used_bytes", "system_memory_total_bytes"]
    if gpu:
        columns += ["gpu0_memory_used_bytes", "gpu0_memory_total_bytes", "gpu0_utilization_percent", "gpu0_power_watts"]
    samples = []
    for at in range(120):
        share = at / 119
        row = [share * seconds, 100 + 90 * math.sin(9 * share) ** 2, peak * min(1, 0.2 + 1.1 * share), 6e9, 24e9]
        samples.append(row + ([5e9 * min(1, 2 * share), 80e9, 95 * share, 300.0] if gpu else []))
    last = {name: max(sample[at] for sample in samples) for at, name in enumerate(columns)}
    return {
        "interval_seconds": seconds / 119,
        "columns": columns,
        "samples": samples,
        "before": {},
        "after": {},
        "peak": last,
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def layer_rows(worst: float, layers: int = 5) -> list[dict[str, Any]]:
    rows = []
    for layer in range(layers):
        for at, kind in enumerate(KINDS):
            error = worst * (0.25 + 0.75 * (layer + 1) / layers) * (0.35 + 0.65 * at / (len(KINDS) - 1))
            rows.append({
                "name": f"model.layers.{layer}.{kind}", "layer": layer, "module": kind, "bits": 4, "group_size": 128,
                "output_error": round(error, 5), "weight_error": round(error * 1.1, 5), "weight_error_max": 0.04,
                "weight_error_mean": 0.008, "level": "high" if error >= 0.25 else "moderate" if error >= 0.1 else "low",
                "tokens": 4096,
            })  # fmt: skip
    return rows


def growth(percent: float) -> float:
    return math.log1p(percent / 100)


def evaluated(name: str, artifacts: Path, whole: bool) -> dict[str, Any]:
    if name == "float":
        percent, size = (0.0, 0.0, 0.0), FLOAT_BYTES
    else:
        _, _, percent, megabytes, worst, _ = VARIANTS[name]
        size = megabytes * 1e6
    middle, low, high = map(growth, percent)
    metrics = {
        "reference_perplexity": 12.65 * math.exp(middle), "reference_nll": 2.5376 + middle, "nll_difference": middle,
        "nll_difference_low": low, "nll_difference_high": high, "perplexity_ratio": math.exp(middle),
        "perplexity_difference": 12.65 * math.expm1(middle), "size_bytes": size, "float_size_bytes": FLOAT_BYTES,
        "compression_ratio": FLOAT_BYTES / size, "tokens_scored": 67251, "documents": 186,
        "top1_agreement": 1 - min(0.6, 1.6 * abs(middle)),
    }  # fmt: skip
    if name != "gptq-w8-g128":
        metrics.update(vllm_perplexity=12.652 * math.exp(middle), engine_relative_difference=1.6e-4)
    verdict = "same" if low <= 0 <= high else "worse"
    write(artifacts / name / "evaluate" / "comparison.json", {"verdict": verdict, "level": 0.95, "seed": 0})
    changes: dict[str, Any] = {}
    if whole and name != "float":
        kl = 0.8 * abs(middle) + 2e-5
        metrics.update(kl_divergence=kl, kl_divergence_low=kl * 0.96, kl_divergence_high=kl * 1.05)
        metrics.update(
            top1_agreement_low=metrics["top1_agreement"] - 0.004, top1_agreement_high=metrics["top1_agreement"] + 0.004
        )
        metrics.update(
            identical_generations=max(0.0, 0.6 - 9 * abs(middle)), first_divergence_median=24 / (1 + 40 * abs(middle))
        )
        flag = {"instrument": "layer error", "value": 0.78, "limit": 0.5,
                "message": "model.layers.4.mlp.down_proj: its output error is beyond what 2 bits explain"}  # fmt: skip
        changes["flags"] = [flag] if name == "gptq-w2-g128" else []
        rows = sorted(layer_rows(worst), key=lambda row: -row["output_error"])[:5]
        write_csv(artifacts / name / "evaluate" / "restored.csv", [
            {**{key: row[key] for key in ("name", "layer", "module", "output_error")},
             "nll_difference_restored": middle * (1 - share), "recovered_nll": middle * share, "recovered_share": share}
            for row, share in zip(rows, (0.19, 0.14, 0.11, 0.06, -0.01), strict=True)
        ])  # fmt: skip
    return result("evaluate", name, 4, middle, metrics=metrics, **changes)


def tasked(name: str, artifacts: Path) -> dict[str, Any]:
    rows = []
    for task, engine, score in (
        ("last_word", "reference", 0.412),
        ("last_word", "vllm", 0.412),
        ("choice", "vllm", 0.655),
    ):
        kept = math.exp(-1.2 * growth(VARIANTS[name][2][0]))
        rows.append({"task": task, "metric": "acc", "engine": engine, "value": score * kept, "stderr": 0.02, "n": 400,
                     "float_value": score, "recovery": kept, "recovery_low": kept - 0.03, "recovery_high": kept + 0.03,
                     "higher_is_better": True})  # fmt: skip
    passed = all(row["recovery"] >= 0.95 for row in rows)
    write(
        artifacts / name / "tasks" / "tasks.json",
        {"rows": rows, "gate": {"passed": passed, "limit": 0.95, "failed": []}},
    )
    return result("tasks", name, 4, 0.0, metrics={})


def timed(name: str, artifacts: Path, speed_ups: tuple[float, float, float]) -> dict[str, Any]:
    rows, ratios = [], []
    for at, concurrency in enumerate((1, 8, 64)):
        for model, factor in (("float", 1.0), ("variant", speed_ups[at])):
            rows.append({
                "model": model, "concurrency": concurrency, "output_tokens_per_second": factor * (210, 900, 1500)[at],
                "request_throughput": factor * (3.2, 14, 23)[at], "ttft_ms_median": (38, 110, 640)[at] / factor,
                "ttft_ms_p99": (55, 190, 1200)[at] / factor, "itl_ms_median": (4.6, 8.6, 41)[at] / factor,
                "itl_ms_p99": (7, 15, 80)[at] / factor, "tpot_ms_median": (4.7, 8.7, 42)[at] / factor,
            })  # fmt: skip
        ratios.append({"concurrency": concurrency, "speed_up": speed_ups[at], "low": speed_ups[at] - 0.05,
                       "high": speed_ups[at] + 0.05, "slower_than_float": speed_ups[at] + 0.05 < 1})  # fmt: skip
    weights = {"float": 21.1e6, "variant": VARIANTS[name][3] * 1.15e6}
    servers = [{"model": model, "load_seconds": 27.5, "weights_memory_bytes": size, "peak_memory_bytes": 1.9e9}
               for model, size in weights.items()]  # fmt: skip
    session = {
        "host": "bench-01",
        "device": "cpu",
        "threads": 2,
        "vllm": "0.32.0",
        "input_tokens": 128,
        "output_tokens": 64,
    }
    write(
        artifacts / name / "speed" / "speed.json",
        {"session": session, "rows": rows, "servers": servers, "ratios": ratios},
    )
    slower = any(row["slower_than_float"] for row in ratios)
    metrics = {
        "weights_memory_bytes": weights["variant"],
        "float_weights_memory_bytes": 21.1e6,
        "slower_than_float": float(slower),
    }
    return result("speed", name, 4, 0.0, metrics=metrics)


def options(name: str, method: str, bits: int) -> dict[str, Any]:
    """A configuration of conf/, with what the pipeline freezes."""
    values = composed(f"method={method}", *([] if method == "float" else [f"bits={bits}"]))
    values["evaluate"]["bootstrap"]["level"] = 0.95
    frozen = {**config(name, method, bits)["frozen"], "locks": {}}
    return {key: value for key, value in {**values, "frozen": frozen}.items() if key != "hydra"}


def records(
    root: Path, *, whole: bool = True, names: Sequence[str] = tuple(VARIANTS), gpu: bool = False
) -> list[VariantRecord]:
    """The float baseline and the named variants; whole: with everything that evaluate, tasks, speed and monitoring add."""
    artifacts = root / "artifacts"
    baseline = [result(stage, "float", 16, 0.0) for stage in ("download", "serve_smoke")] + [
        evaluated("float", artifacts, whole)
    ]
    found = [VariantRecord("float", options("float", "float", 16), "model=demo method=float", baseline, root)]
    for name in names:
        method, bits, _, _, worst, speed_ups = VARIANTS[name]
        results = [
            result(stage, name, bits, 0.0) for stage in ("download", "calibrate", "quantize", "convert", "serve_smoke")
        ]
        write_csv(artifacts / name / "quantize" / "coverage" / "layers.csv", layer_rows(worst))
        if name == "gptq-w8-g128":
            results[-1].update(status="unsupported", reason=REFUSED, metrics={}, peak_memory_bytes=None)
        results.append(evaluated(name, artifacts, whole))
        if whole:
            if speed_ups:
                results += [tasked(name, artifacts), timed(name, artifacts, speed_ups)]
            for at, one in enumerate(results):
                one["monitor"] = monitor(20 + 7 * at, (0.4 + 0.2 * at) * 1e9, gpu=gpu)
        overrides = f"model=demo method={method} bits={bits}"
        found.append(VariantRecord(name, options(name, method, bits), overrides, results, root))
    return found


UNITS = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")
RULES = [{"match": "model.layers.1.self_attn.[qkv]_proj", "skip": True}, {"match": "*.down_proj", "bits": 8}]


def choose(record: VariantRecord, artifacts: Path, *, layers: int = 5, search: dict[str, Any] | None = None) -> None:
    """Give a variant rules by layer, chosen from losses that are kept."""
    record.config["layers"] = {"rules": RULES}
    losses = {
        (f"model.layers.{layer}.{unit}", bits): 4.0 ** (1 - bits) * (1 + layer) * (1 + at)
        for layer in range(layers) for at, unit in enumerate(UNITS) for bits in (2, 3, 4, 8)
    }  # fmt: skip
    keep(artifacts, record.name, shlex.split(record.overrides)[1:], losses, group_size=128, search=search)
