"""The figures that DVC's tables show: eight a variant, named for reading, and those of the variant to ship.

`dvc metrics show` has a row a file, and a column a figure of any file. It fits a terminal of 120 columns only with few
figures, short names, rounded values, and files without an ending, which DVC reads as YAML. `dvc exp show` begins with the
first file: the variant to ship. Everything else is in the stages' results and in the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from quantline.core.files import building, replaced
from quantline.report.build import as_json
from quantline.report.document import Report
from quantline.report.evidence import Row

# The variant to ship; `metrics/` has a file for each variant.
BEST_FILE = "metrics.json"
FOLDER = "metrics"
NO_VARIANT = "none"

Figures = dict[str, float | str]


def write_figures(report: Report, root: Path) -> None:
    """Write `metrics.json` and `metrics/<variant>`."""
    rows = {str(row["variant"]): figures_of(row) for row in report.tables["variants"].rows}
    with building(root / FOLDER) as folder:
        for name, figures in rows.items():
            (folder / name).write_text(as_json(figures), encoding="utf-8")
    with replaced(root / BEST_FILE) as temporary:
        temporary.write_text(as_json(best_of(rows, report.recommendation.chosen)), encoding="utf-8")


def best_of(rows: Mapping[str, Figures], chosen: str | None) -> Figures:
    """The name of the variant to ship, and its figures. rows: the figures of each variant."""
    return {"best": NO_VARIANT} if chosen is None else {"best": chosen, **rows[chosen]}


def figures_of(row: Row) -> Figures:
    """The figures of a row of the report's table of variants; one that was not measured is left out.

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
