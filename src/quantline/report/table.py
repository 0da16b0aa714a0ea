"""A table of the report: rows of plain values in base units, and how to show them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

from quantline.report.evidence import Row
from quantline.report.units import Column

# A table of more rows is folded on the page.
_LONG = 12


@dataclass(frozen=True)
class Table:
    """caption: its content, in one sentence. shown: number of rows on a page, the first ones; None shows all. main: the
    page never folds it. absent: why there are no rows, if they were measured. optional: there is no such table without rows.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[Row]
    shown: int | None = None
    main: bool = False
    absent: str = ""
    optional: bool = False

    @property
    def page_rows(self) -> list[Row]:
        """The rows that a page shows."""
        return self.rows if self.shown is None else self.rows[: self.shown]

    @property
    def folds(self) -> bool:
        """Whether the page folds it, since a reader would have to scroll past it."""
        return not self.main and len(self.page_rows) > _LONG

    @property
    def keys(self) -> list[str]:
        """The columns of the files: the shown columns with the ends of their intervals, then all other keys of the rows."""
        named = [key for column in self.columns for key in (column.key, column.low, column.high) if key]
        return list(dict.fromkeys([*named, *(key for row in self.rows for key in row)]))


def variant_column() -> Column:
    """The column of the variants' names."""
    return Column("variant", "variant", "code")


def as_csv(table: Table) -> str:
    """A table as CSV with a header; an empty cell is a value that was not measured."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.keys)
    for row in table.rows:
        cells = (row.get(key) for key in table.keys)
        writer.writerow([json.dumps(cell, sort_keys=True) if isinstance(cell, dict | list) else cell for cell in cells])
    return stream.getvalue()
