"""The table of a comparison: memory, latency, tokens per second, and the variant's savings and speed-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tabulate

from quantline.core.text import decimal_size

HEADERS = (
    "at a time", "model", "weights", "server", "first token", "between", "request", "tokens/s", "memory", "speed-up",
)  # fmt: skip


def speed_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's rows as plain values in base units, with float and variant of each concurrency together."""
    servers = {server["model"]: server for server in document["servers"]}
    ratios = {ratio["concurrency"]: ratio for ratio in document["ratios"]}
    rows = []
    for row in sorted(document["rows"], key=lambda row: (row["concurrency"], row["model"] != "float")):
        server, ratio = servers[row["model"]], ratios[row["concurrency"]]
        variant = row["model"] == "variant"
        weights = server["weights_memory_bytes"]
        rows.append({
            "concurrency": row["concurrency"], "model": row["model"], "weights_memory_bytes": weights,
            "peak_memory_bytes": server.get("gpu_memory_bytes") or server["peak_memory_bytes"],
            "ttft_ms": row["ttft_ms_median"], "itl_ms": row["itl_ms_median"], "latency_ms": row["latency_ms_median"],
            "output_tokens_per_second": row["output_tokens_per_second"],
            "memory_reduction": 1 - weights / servers["float"]["weights_memory_bytes"] if variant else None,
            "speed_up": ratio["speed_up"] if variant else None, "speed_up_low": ratio["low"] if variant else None,
            "speed_up_high": ratio["high"] if variant else None,
            "slower_than_float": ratio["slower_than_float"] if variant else None,
        })  # fmt: skip
    return rows


def render_speed_table(document: Mapping[str, Any], style: str = "simple") -> str:
    """The comparison as text, from the content of `speed.json`; empty if nothing was measured.

    style: a format of the tabulate library. Sizes are in 10^6 bytes; times are medians over requests.
    """
    cells = [_cells(row) for row in speed_rows(document)]
    if not cells:
        return ""
    align = ("right", "left", *["right"] * 8)
    table = tabulate.tabulate(cells, HEADERS, tablefmt=style, colalign=align, disable_numparse=True)
    session = document["session"]
    how = "took turns, both servers up" if session["side_by_side"] else "were served one after the other"
    note = (
        f"{session['input_tokens']} tokens in, {session['output_tokens']} out, on {session['device_name']}; float and "
        f"variant {how}; speed-up with the smallest and largest of {session['rounds']} rounds; weights: "
        f"{session['weights_memory_is']}"
    )
    return f"{table}\n\n{note}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    saved, gain = "", ""
    if row["model"] == "variant":
        saved = f"{0.0 - 100 * row['memory_reduction']:+.0f} %"
        gain = f"{row['speed_up']:.2f}x [{row['speed_up_low']:.2f}, {row['speed_up_high']:.2f}]"
        gain += " slower" if row["slower_than_float"] else ""
    return [
        str(row["concurrency"]), row["model"], decimal_size(row["weights_memory_bytes"]),
        decimal_size(row["peak_memory_bytes"]), _milliseconds(row["ttft_ms"]), _milliseconds(row["itl_ms"]),
        _milliseconds(row["latency_ms"]), f"{row['output_tokens_per_second']:.4g}", saved, gain,
    ]  # fmt: skip


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
