"""The page over all models of a project: which variant of each to ship, and every model's variants beside each other.

It is made of the reports of the models, so it says nothing that they do not say.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import replaced
from quantline.pipeline.names import joined
from quantline.pipeline.paths import REPORT_MANIFEST
from quantline.report.build import as_json
from quantline.report.evidence import Row, report_folder
from quantline.report.figures import BEST_FILE, NO_VARIANT
from quantline.report.markdown import escaped, grid
from quantline.report.table import Table, as_csv
from quantline.report.units import Column, written

# The tables of the models' reports that DVC's plots draw, of all models in one.
_PLOTTED = ("variants", "layers", "speed")
_CHANGE = Column("difference_percent", "change", "growth", "difference_low_percent", "difference_high_percent")


@dataclass(frozen=True)
class ModelReport:
    """What the report of one model says.

    Attributes:
        name: of its line in params.yaml.
        model: as it is spoken of.
        chosen: the variant to ship; None where none meets the rules.
        headline: the recommendation in a sentence.
        reasons, caveats: of the recommendation.
        ruled_out: the variants that fail rules, with the sentences.
        rows: of its table of variants, with their names as they stand in params.yaml.
    """

    name: str
    model: str
    chosen: str | None
    headline: str
    reasons: tuple[str, ...]
    caveats: tuple[str, ...]
    ruled_out: Mapping[str, Sequence[str]]
    rows: tuple[Row, ...]

    @property
    def link(self) -> str:
        """Its report, from the folder of the page."""
        return f"models/{self.name}/index.html"

    @property
    def advice(self) -> str:
        """What to do, as the rest of a sentence that begins with the model."""
        return f"ship {self.chosen}." if self.chosen else self.headline.removeprefix("None: ")

    def row_of(self, variant: str) -> Row | None:
        """A variant's row; None if this model is not built with it, or has no result of it."""
        return next((row for row in self.rows if row["variant"] == variant and not row["baseline"]), None)


@dataclass(frozen=True)
class Cell:
    """A variant of a model. change: of the perplexity against float, with its interval. served: None if it was not tried."""

    change: str
    size: str
    kl: str
    served: bool | None
    alarms: int
    chosen: bool


def write_overview(root: Path, models: Sequence[str]) -> list[str]:
    """Write report/index.html, report/report.md, report/data and metrics.json; returns a line a model.

    Args:
        root: the checkout.
        models: of params.yaml, in its order.

    Raises:
        UserError: a model has no report, or its files cannot be read.
    """
    home = root / "report"
    found = [read_report(home, name) for name in models]
    files = {f"data/{name}.{ending}": text for name in _PLOTTED for ending, text in _joined(home, models, name).items()}
    files["data/models.json"] = as_json([_plain(one) for one in found])
    files["report.md"] = as_markdown(found)
    files["index.html"] = as_html(found)
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        with replaced(home / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with replaced(root / BEST_FILE) as temporary:
        temporary.write_text(as_json({"best": {one.name: one.chosen or NO_VARIANT for one in found}}), encoding="utf-8")
    return [f"{one.name}: {one.advice}" for one in found]


def read_report(home: Path, name: str) -> ModelReport:
    """The report of a model. home: report/.

    Raises:
        UserError: it is missing, or its files cannot be read.
    """
    folder = report_folder(home, name)
    manifest, said = _json(folder / REPORT_MANIFEST), _json(folder / "data" / "recommendation.json")
    rows = _json(folder / "data" / "variants.json")
    return ModelReport(
        name, str(manifest["model"]), manifest["chosen"], str(manifest["headline"]), tuple(said["reasons"]),
        tuple(said["caveats"]), said["ruled_out"], tuple(rows),
    )  # fmt: skip


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `dvc repro`") from error


def variants_of(found: Sequence[ModelReport]) -> list[str]:
    """The variants of all models, each once, in the order of params.yaml."""
    return list(dict.fromkeys(str(row["variant"]) for one in found for row in one.rows if not row["baseline"]))


def cell_of(one: ModelReport, variant: str) -> Cell | None:
    """What the page says of a model's variant; None where there is none."""
    row = one.row_of(variant)
    if row is None:
        return None
    return Cell(
        _CHANGE.text(row), written(row.get("size_bytes"), "bytes"), written(row.get("kl_divergence"), "nats"),
        row.get("served"), int(row.get("alarms") or 0), variant == one.chosen,
    )  # fmt: skip


def as_html(found: Sequence[ModelReport]) -> str:
    """The page, in the report's style."""
    from quantline.report.page import environment

    variants = variants_of(found)
    cells = {one.name: [cell_of(one, variant) for variant in variants] for one in found}
    return environment().get_template("overview.html.j2").render(models=found, variants=variants, cells=cells)


def as_markdown(found: Sequence[ModelReport]) -> str:
    """The page as Markdown."""
    rows: list[Row] = [
        {**row, "model": one.name, "ship": "yes" if row["variant"] == one.chosen else ""}
        for one in found
        for row in one.rows
    ]
    columns = (
        Column("model", "model", "code"), Column("variant", "variant", "code"), Column("ship", "ship"), _CHANGE,
        Column("size_bytes", "weights on disk", "bytes"), Column("kl_divergence", "KL, nats a token", "nats"),
        Column("served", "served", "yes"), Column("alarms", "alarms", "count", missing="-"),
    )  # fmt: skip
    lines = ["# Which variant of each model to ship", ""]
    lines += [
        f"- **{one.name}** ({escaped(one.model)}): {escaped(one.advice)} [Its report](models/{one.name}/report.md)"
        for one in found
    ]
    return "\n".join([*lines, "", grid(columns, rows), ""])


def _plain(one: ModelReport) -> Mapping[str, Any]:
    return {
        "name": one.name, "model": one.model, "chosen": one.chosen, "headline": one.headline,
        "variants": [row["variant"] for row in one.rows], "report": one.link,
    }  # fmt: skip


def _joined(home: Path, models: Sequence[str], name: str) -> dict[str, str]:
    """A table of all models in one, as the text of its files; variants have their whole names."""
    rows: list[Row] = [
        {**row, "variant": joined(model, str(row["variant"]))}
        for model in models
        for row in _json(report_folder(home, model) / "data" / f"{name}.json")
    ]
    columns = tuple(Column(key, key) for key in dict.fromkeys(key for row in rows for key in row))
    if not rows:  # DVC's plots need the columns' names
        with (report_folder(home, models[0]) / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            columns = tuple(Column(key, key) for key in next(csv.reader(file), []))
    return {"csv": as_csv(Table(name, "", columns, rows)), "json": as_json(rows)}
