"""Two settings of the server of one checkpoint, compared: what one costs in speed and saves in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tabulate

from quantline.core.text import decimal_size, digits

# The labels of a session's two subjects, see `speed.run`: here the same checkpoint is both.
BEFORE, AFTER = "as it is", "changed"
_LABELS = {"float": BEFORE, "variant": AFTER}
_HEADERS = ("at a time", "served", "memory", "first token", "between", "request", "tokens/s", "")


def relabelled(document: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `speed.json` of a session of two settings, under the names of the settings."""
    tables = {
        name: [{**row, **({"model": _LABELS[row["model"]]} if "model" in row else {})} for row in document[name]]
        for name in ("rows", "servers", "rounds", "offline")
    }
    ratios = [
        {("changed_slower" if key == "slower_than_float" else key): value for key, value in ratio.items()}
        for ratio in document["ratios"]
    ]
    return {"session": document["session"], **tables, "ratios": ratios}


def render(document: Mapping[str, Any]) -> str:
    """The comparison as text, from a relabelled document. Times are medians over requests in ms.

    memory: of the GPU, or of the server's processes on a CPU; the last column is what is saved of it, and the speed over
    that of the unchanged server with the smallest and largest of all rounds.
    """
    memory = {server["model"]: _memory(server) for server in document["servers"]}
    ratios = {ratio["concurrency"]: ratio for ratio in document["ratios"]}
    rows = []
    for row in sorted(document["rows"], key=lambda row: (row["concurrency"], row["model"] != BEFORE)):
        said = ""
        if row["model"] == AFTER:
            ratio = ratios[row["concurrency"]]
            saved = memory[BEFORE] - memory[AFTER]
            # One round has no spread, and an interval of no width would read as a sure thing.
            spread = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio["low"] < ratio["high"] else " (one round)"
            said = (
                f"{ratio['speed_up']:.2f}x as fast{spread}, "
                f"{decimal_size(abs(saved))} {'less' if saved >= 0 else 'more'}"
            )
        times = [f"{digits(row[key], 3)} ms" for key in ("ttft_ms_median", "itl_ms_median", "latency_ms_median")]
        rows.append([
            str(row["concurrency"]), row["model"], decimal_size(memory[row["model"]]), *times,
            digits(row["output_tokens_per_second"], 3), said,
        ])  # fmt: skip
    align = ("right", "left", *["right"] * 5, "left")
    return (
        str(tabulate.tabulate(rows, _HEADERS, tablefmt="plain", colalign=align, disable_numparse=True)) if rows else ""
    )


def _memory(server: Mapping[str, Any]) -> float:
    return float(server.get("gpu_memory_bytes") or server["peak_memory_bytes"] or 0)
