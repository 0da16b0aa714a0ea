"""The table of variants: quality, size and speed of each.

`variant_table` returns rows of plain values in base units (bytes, seconds, percent), ready for JSON; `render_table` formats
them as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tabulate

from quantline.evaluation.nats import growth
from quantline.pipeline.records import VariantRecord, by_stage

BASELINE = "float"
MISSING = "-"
REASON_CHARS = 14
HEADERS = (
    "variant", "method", "bits", "group", "ppl", "Δ ppl vs float [95 %]", "vLLM ppl", "MB", "ratio", "tok/s", "load s",
    "quant s", "served",
)  # fmt: skip


def variant_table(records: Sequence[VariantRecord]) -> list[dict[str, Any]]:
    """One row per variant, the float baseline first; a value that was not measured is None.

    difference_percent: how much the perplexity grew against float, by the reference engine on the same tokens, with the
    ends of its 95 % interval. perplexity is of the reference engine too, vllm_perplexity of the real server. size_bytes:
    the weights on disk. compression_ratio: float size over size. served: None where serving was not tried. reasons: for
    each stage that the variant could not pass, its reason in full.
    """
    ordered = sorted(records, key=lambda record: record.name != BASELINE)
    return [_row(record) for record in ordered]


def _row(record: VariantRecord) -> dict[str, Any]:
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
    baseline = record.name == BASELINE or method.get("name") == BASELINE
    served = False if reasons else None
    if "serve_smoke" in results:
        served = results["serve_smoke"]["status"] == "ok"
    return {
        "variant": record.name,
        "method": method.get("name"),
        "bits": None if baseline else record.config.get("bits"),
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


def render_table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """The rows as text of at most about 150 columns, with the reasons in full below.

    style: a format of the tabulate library; `simple` for a terminal, `github` for a README. MB are 10^6 bytes.
    """
    notes: list[str] = []
    cells = [_cells(row, notes) for row in rows]
    if style == "github":  # a bar in a cell would start another column
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    align = ("left", "left", *["right"] * 3, "left", *["right"] * 6, "left")
    padding = tabulate.MIN_PADDING
    tabulate.MIN_PADDING = 0  # it widens every column by two, and the table would not fit a screen
    try:
        table = tabulate.tabulate(
            cells, HEADERS, tablefmt=style, colalign=align if cells else None, disable_numparse=True
        )
    finally:
        tabulate.MIN_PADDING = padding
    if not notes:
        return table
    lines = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    # In Markdown, a single line break would join the notes into one paragraph.
    return table + "\n\n" + ("\n" if style != "github" else "\n\n").join(lines)


def _cells(row: Mapping[str, Any], notes: list[str]) -> list[str]:
    group = row["group_size"]
    return [
        row["variant"],
        row["method"] or MISSING,
        MISSING if row["bits"] is None else str(row["bits"]),
        MISSING if group is None else "channel" if group == -1 else str(group),
        _number(row["perplexity"], 4),
        "baseline" if row["baseline"] else _difference(row),
        _number(row["vllm_perplexity"], 4),
        _number(row["size_bytes"], 3, 1e-6),
        MISSING if row["compression_ratio"] is None else f"{row['compression_ratio']:.2f}x",
        _number(row["output_tokens_per_second"], 3),
        _number(row["load_seconds"], 3),
        _number(row["quantize_seconds"], 3),
        _served(row, notes),
    ]


def _difference(row: Mapping[str, Any]) -> str:
    middle, low, high = (row[f"difference_{end}percent"] for end in ("", "low_", "high_"))
    if middle is None:
        return MISSING
    # The number of decimals depends on the interval: +0.031 % must not be shown as +0.0 %.
    widest = max(abs(value) for value in (middle, low, high) if value is not None)
    decimals = 0 if widest >= 100 else 1 if widest >= 10 else 2 if widest >= 0.1 else 3
    text = f"{middle:+.{decimals}f} %"
    return text if low is None or high is None else f"{text} [{low:+.{decimals}f}, {high:+.{decimals}f}]"


def _served(row: Mapping[str, Any], notes: list[str]) -> str:
    marks = []
    stages_of: dict[str, list[str]] = {}
    for stage, reason in row["reasons"].items():
        stages_of.setdefault(" ".join(reason.split()), []).append(stage)
    for reason, stages in stages_of.items():
        notes.append(f"{row['variant']}, {' and '.join(stages)}: {reason}")
        marks.append(f"[{len(notes)}]")
    if row["served"] is None:
        return MISSING
    if row["served"]:
        return " ".join(["yes", *marks])
    reasons = row["reasons"]
    short = " ".join(str(reasons.get("serve_smoke") or next(iter(reasons.values()), "")).split())
    if len(short) > REASON_CHARS:
        short = short[:REASON_CHARS].rsplit(" ", 1)[0].rstrip(",;:.") + "..."
    return " ".join([f"no: {short}", *marks])


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    """A value with this many significant digits, with an exponent only for very large and very small values."""
    if value is None:
        return MISSING
    scaled = value * factor
    if not math.isfinite(scaled) or abs(scaled) >= 1e7 or 0 < abs(scaled) < 1e-3:
        return f"{scaled:.2e}"
    whole = len(str(int(abs(scaled)))) if abs(scaled) >= 1 else 0
    return f"{scaled:.{max(0, digits - whole)}f}"
