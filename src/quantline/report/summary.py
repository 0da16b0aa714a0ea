"""The table of variants: quality, size and speed of each.

`variant_table` returns rows of plain values in base units (bytes, seconds, percent), ready for JSON; `render_table` formats
them as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tabulate

from quantline.pipeline.figures import MISSING, difference_text, group_text, number_text, row_of
from quantline.pipeline.names import is_baseline_name, model_of
from quantline.pipeline.records import VariantRecord

REASON_CHARS = 14
HEADERS = (
    "variant", "method", "bits", "group", "ppl", "Δ ppl vs float [95 %]", "vLLM ppl", "MB", "ratio", "tok/s", "load s",
    "quant s", "served",
)  # fmt: skip
# What the columns of speed are, below the table.
LEGEND = (
    "tok/s: output tokens a second of one request at a time (batch 1), when serve_smoke asked its questions; load s: start "
    "of that server.\nThe first row has the float model's, of a session of its own. Beside float in one session, by "
    "requests at once: speed, in the report."
)


def variant_table(records: Sequence[VariantRecord]) -> list[dict[str, Any]]:
    """One row per variant, each model's float baseline first; a value that was not measured is None.

    difference_percent: how much the perplexity grew against float, by the reference engine on the same tokens, with the
    ends of its 95 % interval. perplexity is of the reference engine too, vllm_perplexity of the real server. size_bytes:
    the weights on disk. compression_ratio: float size over size. served: None where serving was not tried. reasons: for
    each stage that the variant could not pass, its reason in full.
    """
    models = list(dict.fromkeys(model_of(record.name) for record in records))
    ordered = sorted(
        records, key=lambda record: (models.index(model_of(record.name)), not is_baseline_name(record.name))
    )
    return [row_of(record) for record in ordered]


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
    return [
        row["variant"],
        row["method"] or MISSING,
        MISSING if row["bits"] is None else str(row["bits"]),
        group_text(row["group_size"]),
        number_text(row["perplexity"], 4),
        "baseline" if row["baseline"] else difference_text(row),
        number_text(row["vllm_perplexity"], 4),
        number_text(row["size_bytes"], 3, 1e-6),
        MISSING if row["compression_ratio"] is None else f"{row['compression_ratio']:.2f}x",
        number_text(row["output_tokens_per_second"], 3),
        number_text(row["load_seconds"], 3),
        number_text(row["quantize_seconds"], 3),
        _served(row, notes),
    ]


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
