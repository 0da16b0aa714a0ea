"""The report as one HTML page, without scripts and network requests; it embeds every table as a file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from quantline.report.document import Report
from quantline.report.table import Table

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
# A larger table is not embedded, only linked as a file.
_EMBEDDED_BYTES = 200_000


def environment() -> Environment:
    """The templates, with the style as `style`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.globals["style"] = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))  # noqa: S704
    return made


def as_html(report: Report) -> str:
    """The page; it links each table as data/<table>.json, and embeds it as CSV unless it is too large."""
    from markupsafe import Markup

    page = environment().get_template("page.html.j2")
    return page.render(
        report=report, sections=report.sections, rec=report.recommendation, tables=report.tables,
        svg=lambda plot: Markup(plot.inline), csv_link=_csv_link,  # noqa: S704 - our own SVG, its texts are escaped
    )  # fmt: skip


def _csv_link(table: Table) -> str:
    from quantline.report.table import as_csv

    content = as_csv(table).encode()
    if len(content) > _EMBEDDED_BYTES:
        return f"data/{table.name}.csv"
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(content).decode()}"
