"""What is said of a variant in one line: its measurements as a row, and its figures, rounded and named for reading.

DVC's tables, MLflow's table and the report's take them from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from quantline.config.method import BASELINE
from quantline.evaluation.nats import growth
from quantline.pipeline.names import is_baseline_name
from quantline.pipeline.records import VariantRecord, by_stage

MISSING = "-"
Row = dict[str, Any]
Figures = dict[str, float | str]


def row_of(record: VariantRecord) -> Row:
    """A variant's measurements in base units (bytes, seconds, percent), see `report.summary.variant_table`."""
    results = by_stage(record.results)
    measured: dict[str, dict[str, Any]] = {
        stage: dict(result.get("metrics") or {}) for stage, result in results.items()
    }
    evaluate, smoke = measured.get("evaluate", {}), measured.get("serve_smoke", {})
    reasons = {
        stage: str(result.get("reason") or "no reason given")
        for stage, result in results.items()
        if result["status"] == "unsupported"
    }
    method = record.config.get("method") or {}
    baseline = is_baseline_name(record.name) or method.get("name") == BASELINE
    served = False if reasons else None
    if "serve_smoke" in results:
        served = results["serve_smoke"]["status"] == "ok"
    return {
        "variant": record.name,
        "method": method.get("name"),
        "bits": None if baseline else _bits(record, measured.get("quantize", {})),
        "group_size": None if baseline else record.config.get("group_size"),
        "baseline": baseline,
        "perplexity": evaluate.get("reference_perplexity"),
        "difference_percent": None if baseline else _growth(evaluate),
        "difference_low_percent": None if baseline else _percent(evaluate.get("nll_difference_low")),
        "difference_high_percent": None if baseline else _percent(evaluate.get("nll_difference_high")),
        "vllm_perplexity": evaluate.get("vllm_perplexity"),
        "size_bytes": evaluate.get("size_bytes"),
        "compression_ratio": evaluate.get("compression_ratio"),
        "output_tokens_per_second": smoke.get("output_tokens_per_second"),
        "load_seconds": smoke.get("load_seconds"),
        "quantize_seconds": measured.get("quantize", {}).get("quantize_seconds"),
        "served": served,
        "reasons": reasons,
    }


def _bits(record: VariantRecord, quantize: Mapping[str, Any]) -> Any:
    """Bits of a weight; of a mixture of types (GGUF), whose name says little, those of its linears with their scales."""
    found = quantize.get("effective_bits")
    mixed = (record.config.get("method") or {}).get("type") is not None
    return round(found, 2) if mixed and found is not None else record.config.get("bits")


def _percent(nll_difference: float | None) -> float | None:
    """A difference of mean log-likelihoods as growth of the perplexity: their exponential is the perplexities' ratio."""
    if nll_difference is None:
        return None
    return 100.0 * growth(nll_difference)


def _growth(metrics: Mapping[str, Any]) -> float | None:
    if metrics.get("nll_difference") is not None:
        return _percent(metrics["nll_difference"])
    ratio = metrics.get("perplexity_ratio")
    return None if ratio is None else 100.0 * (ratio - 1.0)


def measured(record: VariantRecord) -> Row:
    """`row_of` with the KL divergence in nats a token, the number of alarms, and the mean speed-up over float."""
    row = row_of(record)
    results = by_stage(record.results)
    evaluate, speed = ((results.get(stage) or {}).get("metrics") or {} for stage in ("evaluate", "speed"))
    # One for each number of requests at once.
    ratios = [value for name, value in speed.items() if name.startswith("speed_up_c") and value]
    return {
        **row,
        "kl_divergence": None if row["baseline"] else evaluate.get("kl_divergence"),
        "alarms": None if row["baseline"] else evaluate.get("alarms"),
        "speed_up": mean_ratio(ratios),
    }


def mean_ratio(ratios: Iterable[float]) -> float | None:
    """The geometric mean; None if there are no values."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def group_text(group: int | None) -> str:
    """A group size for reading; -1 is one group a channel."""
    return MISSING if group is None else "channel" if group == -1 else str(group)


def difference_text(row: Mapping[str, Any]) -> str:
    """Growth of the perplexity over float with its interval: `+2.46 % [+2.28, +2.65]`."""
    middle, low, high = (row[f"difference_{end}percent"] for end in ("", "low_", "high_"))
    if middle is None:
        return MISSING
    # The number of decimals depends on the interval: +0.031 % must not be shown as +0.0 %.
    widest = max(abs(value) for value in (middle, low, high) if value is not None)
    decimals = 0 if widest >= 100 else 1 if widest >= 10 else 2 if widest >= 0.1 else 3
    text = f"{middle:+.{decimals}f} %"
    return text if low is None or high is None else f"{text} [{low:+.{decimals}f}, {high:+.{decimals}f}]"


def number_text(value: float | None, digits: int, factor: float = 1.0) -> str:
    """A value with this many significant digits, with an exponent only for very large and very small values."""
    if value is None:
        return MISSING
    scaled = value * factor
    if not math.isfinite(scaled) or abs(scaled) >= 1e7 or 0 < abs(scaled) < 1e-3:
        return f"{scaled:.2e}"
    whole = len(str(int(abs(scaled)))) if abs(scaled) >= 1 else 0
    return f"{scaled:.{max(0, digits - whole)}f}"


def figures_of(row: Row) -> Figures:
    """The figures of a row of `measured` or of the report's table of variants; one that was not measured is left out.

    change_percent: growth of the perplexity over the float model's, with the ends of its interval, low and high. size_mb:
    the weights on disk, in 10^6 bytes. kl: divergence from the float model, nats a token. tok_s: output tokens per second
    of one request.
    """
    served = row.get("served")
    found: dict[str, float | str | None] = {
        "change_percent": _decimals(row.get("difference_percent")),
        "size_mb": _significant(row.get("size_bytes"), 4, 1e-6),
        "served": None if served is None else "yes" if served else "no",
        "low": _decimals(row.get("difference_low_percent")),
        "high": _decimals(row.get("difference_high_percent")),
        "kl": _significant(row.get("kl_divergence"), 2),
        "perplexity": _significant(row.get("perplexity"), 4),
        "tok_s": _significant(row.get("output_tokens_per_second"), 3),
    }
    return {name: value for name, value in found.items() if value is not None}


def _decimals(value: float | None) -> float | str | None:
    return _rounded(value, lambda known: round(known, 3))


def _significant(value: float | None, count: int, factor: float = 1.0) -> float | str | None:
    return _rounded(value, lambda known: float(f"{known * factor:.{count}g}"))


def _rounded(value: float | None, rule: Callable[[float], float]) -> float | str | None:
    if value is None:
        return None
    return rule(value) if math.isfinite(value) else str(value)  # DVC reads JSON that has no infinity
