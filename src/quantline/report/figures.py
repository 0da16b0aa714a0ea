"""The figures that DVC's tables show: eight a variant, named for reading, and those of the variant to ship.

`dvc metrics show` has a row a file, and a column a figure of any file. It fits a terminal of 120 columns only with few
figures, short names, rounded values, and files without an ending, which DVC reads as YAML. `dvc exp show` begins with the
first file: the variant to ship. Everything else is in the stages' results and in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantline.core.files import building, replaced
from quantline.pipeline.figures import Figures, figures_of
from quantline.report.build import as_json
from quantline.report.document import Report

# The variant to ship; `metrics/` has a file for each variant.
BEST_FILE = "metrics.json"
FOLDER = "metrics"
NO_VARIANT = "none"


def write_figures(report: Report, root: Path, model: str = "") -> None:
    """Write `metrics.json` and `metrics/<variant>`; of one of several models, `metrics/<model>/<variant>` alone."""
    rows = {str(row["variant"]): figures_of(row) for row in report.tables["variants"].rows}
    with building(root / FOLDER / model) as folder:
        for name, figures in rows.items():
            (folder / name).write_text(as_json(figures), encoding="utf-8")
    if model:
        return
    with replaced(root / BEST_FILE) as temporary:
        temporary.write_text(as_json(best_of(rows, report.recommendation.chosen)), encoding="utf-8")


def best_of(rows: Mapping[str, Figures], chosen: str | None) -> Figures:
    """The name of the variant to ship, and its figures. rows: the figures of each variant."""
    return {"best": NO_VARIANT} if chosen is None else {"best": chosen, **rows[chosen]}
