"""The report as Markdown: the same text and tables, with plots as separate files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantline.report.document import Part, Report
from quantline.report.evidence import Row
from quantline.report.table import Table
from quantline.report.units import Column


def as_markdown(report: Report) -> str:
    """The whole report; links are relative to its folder."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def _lines(report: Report) -> Iterator[str]:
    found = report.recommendation
    yield from (f"# Which variant of {report.model} to ship", "")
    if report.of_several:
        yield from ("[All models](../../report.md)", "")
    yield from (f"**{found.headline}**", "")
    yield from (f"- {reason}" for reason in found.reasons)
    if found.caveats:
        yield from ("", "What to keep in mind:", "", *(f"- {caveat}" for caveat in found.caveats))
    if found.ruled_out:
        yield from ("", "Ruled out:", "")
        yield from (f"- `{name}`: {'; '.join(reasons)}" for name, reasons in found.ruled_out.items())
    if found.passed_over:
        yield from ("", "Fit, but not preferred:", "")
        yield from (f"- `{name}`: {reason}" for name, reason in found.passed_over.items())
    yield from ("", "## Alarms", "", _watched(report), "")
    for name, flags in report.alarms.items():
        yield from (f"- **`{name}`**, {flag.get('instrument')}: {flag.get('message')}" for flag in flags)
    yield from ("", *(f"- {label}: {text}" for label, text in report.summary))
    for section in report.sections:
        yield from ("", f"## {section.heading}")
        if section.said:
            yield from ("", report.said(section))
        for part in report.parts(section):
            yield from _part(report, part)
    yield from ("", "## Words", "", *(f"- **{term}**: {meaning}" for term, meaning in report.glossary.items()))


def _part(report: Report, part: Part) -> Iterator[str]:
    if part.kind == "table":
        yield from ("", *_table(report.tables[part.name]))
    elif part.kind == "files":
        yield from ("", f"{part.said} {_links(part.name)}")
    else:
        found = report.plots_of(part.name)
        if found and part.said:
            yield from ("", part.said)
        for plot in found:
            yield from ("", f"![{plot.title}](plots/{plot.name}.svg)", "", plot.caption)


def _links(name: str) -> str:
    return f"[CSV](data/{name}.csv), [JSON](data/{name}.json)"


def _watched(report: Report) -> str:
    if report.alarms:
        return f"{sum(map(len, report.alarms.values()))} alarms, of {', '.join(f'`{name}`' for name in report.alarms)}:"
    if report.unwatched:
        names = ", ".join(f"`{name}`" for name in report.unwatched)
        return f"Not checked: the evaluation of {names} did not run the measurements for them."
    return "None."


def _table(table: Table) -> Iterator[str]:
    yield from (f"{table.caption} {_links(table.name)}", "")
    yield grid(table.columns, table.page_rows) if table.page_rows else table.absent or "Not measured."


def grid(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Rows as a table of Markdown."""
    import tabulate

    cells = [[escaped(column.text(row)) for column in columns] for row in rows]
    align = ["right" if column.numeric else "left" for column in columns]
    headers = [column.label for column in columns]
    return tabulate.tabulate(cells, headers, tablefmt="github", colalign=align, disable_numparse=True)


def escaped(text: str) -> str:
    """Text for one line or cell of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
