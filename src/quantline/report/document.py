"""The content of a report and its sections: one list for the page and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantline.report.evidence import Row
from quantline.report.recommendation import Recommendation
from quantline.report.svg import Plot
from quantline.report.table import Table


@dataclass(frozen=True)
class Part:
    """A part of a section.

    kind: plot, table or files (links to a table that is only a file). name: of the plot or table; a plot's that ends with
    `-` stands for one plot per variant. folded: heading under which the page folds it; plots per variant have their own.
    said: a sentence for it; a table's is shown if nothing was measured.
    """

    kind: Literal["plot", "table", "files"]
    name: str
    said: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Section:
    """A section between the alarms and the glossary. key: its anchor. name: in the page's navigation. said: its first
    paragraph, in which `{level}` is the level of the intervals in per cent. optional: it has only those parts
    that are there, and is left out if none is.
    """

    key: str
    name: str
    heading: str
    parts: tuple[Part, ...]
    said: str = ""
    optional: bool = False


SECTIONS = (
    Section("glance", "At a glance", "At a glance", (Part("plot", "quality-size"), Part("table", "variants"))),
    Section(
        "quality", "Quality", "How much quality is lost, and is it real?",
        (Part("plot", "distances"), Part("table", "quality"), Part("table", "groups"), Part("table", "generations")),
        "Variant and float model score the same tokens. Intervals are a paired bootstrap over documents at {level} %: "
        "“worse” means that the whole interval lies above zero, “same” that this text does not tell the two apart.",
    ),
    Section(
        "tasks", "Tasks", "Tasks",
        (Part("plot", "tasks"), Part("table", "tasks", "Choose tasks with the group conf/tasks.")),
    ),
    Section(
        "errors", "Errors by layer", "Where the error comes from",
        (
            Part("plot", "errors-", "The relative output error of each linear over calibration text, on one scale for all "
                 "variants: darker is worse."),
            Part("table", "worst_layers"), Part("files", "layers", "Every linear:"),
            Part("plot", "restored"), Part("table", "restored"),
        ),
    ),
    Section(
        "search", "Search", "How were they chosen?",
        (
            Part("table", "searches"), Part("plot", "front-"), Part("table", "search_measured"),
            Part("table", "search_untried"),
            Part("plot", "losses-", "What rounding one unit of linears alone costs, in nats a token, and the width that the "
                 "variant gave it. A unit is what the server fuses.", folded="Loss of each unit by width."),
            Part("files", "unit_losses", "Every unit and width:"),
        ),
        optional=True,
    ),
    Section(
        "speed", "Speed", "How fast is it here?",
        (
            Part("plot", "speed-up"), Part("plot", "speed"), Part("table", "speed_ratios"),
            Part("table", "speed", "Choose what to measure with the group conf/speed."),
            Part("table", "servers"), Part("table", "library"),
        ),
    ),
    Section(
        "fleet", "Fleet", "Does the fleet lose requests?", (Part("table", "fleet"),),
        "Several of these variants behind one endpoint, the first of the chain with a fault while requests come. A request "
        "is lost if it got no answer before its first byte.",
        optional=True,
    ),
    Section("memory", "Memory", "How much memory does it need?", (Part("plot", "memory"), Part("table", "memory"))),
    Section(
        "serve", "Serve it", "How is it served?", (Part("table", "serving"),),
        "Here by name; on another machine by the line of vLLM, in the folder of the variant’s files. Memory is "
        "the machine’s: set the size of the cache for it.",
    ),
    Section(
        "stages", "Stages", "What the stages noted, took and loaded",
        (
            Part("table", "notes"), Part("table", "costs", folded="Time and memory of every stage"),
            Part("plot", "monitor-", folded="Load while the stages ran."),
        ),
    ),
    Section(
        "protocol", "Protocol", "Protocol", (Part("table", "protocol"),),
        "Everything under which quality and speed were measured. A perplexity by another protocol is another quantity.",
    ),
    Section(
        "again", "Make it again", "Make it again",
        (
            Part("table", "commands"), Part("table", "environment", folded="Environments and versions"),
            Part("table", "fingerprints", folded="Fingerprints"),
        ),
        "At the same commit, with the variant’s line in params.yaml; equal fingerprints mean the same recipe.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Everything that the documents show. plots: by name; plots per variant are named `<kind>-<variant>`.

    of_several: the project has other models, too, and a page over all of them.
    """

    model: str
    summary: list[tuple[str, str]]
    recommendation: Recommendation
    tables: dict[str, Table]
    plots: dict[str, Plot]
    glossary: dict[str, str]
    level: float
    alarm_advice: str
    alarms: dict[str, list[Row]]
    unwatched: list[str]
    of_several: bool = False

    def plots_of(self, name: str) -> list[Plot]:
        """The plot with this name, or with `errors-` the plots of all variants; empty if nothing was drawn."""
        if not name.endswith("-"):
            return [self.plots[name]] if name in self.plots else []
        return [plot for key, plot in self.plots.items() if key.startswith(name)]

    @property
    def sections(self) -> list[Section]:
        """The sections that it has."""
        return [one for one in SECTIONS if self.parts(one)]

    def parts(self, section: Section) -> list[Part]:
        """The parts of a section: no table that was not made, and of an optional section only what is there."""
        if not section.optional:
            return [part for part in section.parts if part.kind != "table" or part.name in self.tables]
        return [
            part for part in section.parts
            if (self.plots_of(part.name) if part.kind == "plot" else part.name in self.tables)
        ]  # fmt: skip

    def said(self, section: Section) -> str:
        """The first paragraph of a section."""
        return section.said.format(level=f"{100 * self.level:g}")
