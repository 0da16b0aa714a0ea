"""What a report holds."""

from __future__ import annotations

from dataclasses import dataclass

from quantline.report.evidence import Row
from quantline.report.recommendation import Recommendation
from quantline.report.svg import Plot
from quantline.report.table import Table


@dataclass(frozen=True)
class Report:
    """Everything that the documents show. plots: by name; those that a variant has one of are named `<kind>-<variant>`."""

    model: str
    summary: list[tuple[str, str]]
    recommendation: Recommendation
    tables: dict[str, Table]
    plots: dict[str, Plot]
    glossary: dict[str, str]
    level: float
    alarms: dict[str, list[Row]]
    unwatched: list[str]

    def plots_of(self, kind: str) -> list[Plot]:
        """The plots that each variant has one of."""
        return [plot for name, plot in self.plots.items() if name.startswith(f"{kind}-")]
