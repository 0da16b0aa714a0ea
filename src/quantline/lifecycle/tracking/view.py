"""What MLflow's pages show of the variants: the columns of their table, the groups of their figures, the saved view.

A column is a tag: its text is read as it stands (`+2.46 % [+2.28, +2.65]`), where MLflow shows a metric with ten digits, and
another text makes no new run. The same figures are metrics, for sorting and for charts; the digits before their names put
them before everything else, since MLflow orders metrics by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from quantline.pipeline.figures import MISSING, Row, difference_text, figures_of, group_text, number_text

VIEW, VIEW_BY_HAND, VIEW_SEARCHES = "variants", "by-hand", "searches"
CHARTS = "Which one to ship"
# Stands for the id of the experiment in a text that is written before it is known.
EXPERIMENT = "EXPERIMENT_ID"
# How the description of an experiment begins, by which one that a user wrote is told from it.
INTRODUCED = "[Compare the variants](#"
# Column -> its width in pixels; all of them fit a window of 1400 pixels, beside the run's name and time.
COLUMNS = {
    "method": 80, "bits": 48, "group": 65, "change of perplexity": 190, "KL": 80, "size": 80, "speed-up": 72, "served": 60,
    "alarms": 65,
}  # fmt: skip
# The same of the table of searches and their candidates.
SEARCH_COLUMNS = {"state": 85, "change of perplexity": 180, "KL": 75, "size": 75, "documents": 90, "why": 265}
# Figure -> the group in which MLflow lists and draws it.
_GROUPS = {
    "change_percent": "1 quality", "low": "1 quality", "high": "1 quality", "kl": "1 quality", "perplexity": "1 quality",
    "alarms": "1 quality", "size_mb": "2 size", "served": "3 serving", "speed_up": "3 serving", "tok_s": "3 serving",
}  # fmt: skip


def metric_name(figure: str) -> str:
    """The metric of a figure of `pipeline.figures`: `1 quality/kl`."""
    return f"{_GROUPS[figure]}/{figure}"


def figure_metrics(row: Row) -> dict[str, float | str]:
    """The figures of a row of `pipeline.figures.measured` as metrics; served is 1 or 0."""
    figures = figures_of(row)
    if row["alarms"] is not None:
        figures["alarms"] = row["alarms"]
    if row["speed_up"] is not None:
        figures["speed_up"] = round(row["speed_up"], 3)
    if "served" in figures:
        figures["served"] = float(figures["served"] == "yes")
    return {metric_name(name): figures[name] for name in _GROUPS if name in figures}


def columns_of(row: Row) -> dict[str, str]:
    """The text of every column for a row of `pipeline.figures.measured`."""
    served = row["served"]
    size, ratio = number_text(row["size_bytes"], 3, 1e-6), number_text(row["speed_up"], 3)
    texts = (
        str(row["method"] or MISSING), MISSING if row["bits"] is None else str(row["bits"]), group_text(row["group_size"]),
        "baseline" if row["baseline"] else difference_text(row), number_text(row["kl_divergence"], 3),
        size if size == MISSING else f"{size} MB", ratio if ratio == MISSING else f"{ratio}x",
        MISSING if served is None else "yes" if served else "no",
        MISSING if row["alarms"] is None else f"{row['alarms']:.0f}",
    )  # fmt: skip
    return dict(zip(COLUMNS, texts, strict=True))


def condition(role: str, *, by_hand: bool = False) -> str:
    """MLflow's filter for the current runs of a role, `variant` or `report`; by_hand: of the variants run by hand."""
    wanted = {"current": "true", "role": role}
    if role == "variant":
        wanted["by_hand"] = str(by_hand).lower()
    return " and ".join(f"tags.\"quantline.{key}\" = '{value}'" for key, value in wanted.items())


# MLflow has pages for applications of language models, which it opens first, and pages for models.
_OF_MODELS = "workflowType=machine_learning"


def view_path(experiment_id: str, view: str = VIEW) -> str:
    """The address of a table of variants in MLflow's UI, after the `#`."""
    return f"/experiments/{experiment_id}/runs?{_OF_MODELS}&viewStateShareKey={view}"


def report_path(experiment_id: str) -> str:
    """The address of the report's run in MLflow's list of runs, after the `#`."""
    return f"/experiments/{experiment_id}/runs?{_OF_MODELS}&searchFilter={quote(condition('report'))}"


def introduction(experiment_id: str) -> str:
    """The description of the experiment, Markdown."""
    return (
        f"{INTRODUCED}{view_path(experiment_id)}) · [their charts](#{view_path(experiment_id)}&compareRunsMode=CHART) · "
        f"[those run by hand](#{view_path(experiment_id, VIEW_BY_HAND)}) · "
        f"[searches](#{view_path(experiment_id, VIEW_SEARCHES)}) · "
        f"[which one to ship: the report](#{report_path(experiment_id)}). One run a variant, one child a stage."
    )


def view_state(sections: Sequence[str] = (), *, by_hand: bool = False) -> Mapping[str, Any]:
    """The state of a table of variants and its charts, in the format in which MLflow's "share this view" stores it.

    sections: of charts that MLflow makes by itself, see `sections_of`; they are folded, below the charts that matter.
    """
    columns = {f"tags.`{name}`": width for name, width in COLUMNS.items()}
    pinned = {"attributes.`Run Name`": 185, "runDateAndNestInfo": 130}
    widths = {**pinned, **columns, "duration": 85}
    return {
        "searchFilter": condition("variant", by_hand=by_hand),
        "orderByKey": f"metrics.`{metric_name('change_percent')}`", "orderByAsc": True,
        "selectedColumns": list(columns), "columnOrder": list(widths), "columnWidths": widths,
        "lifecycleFilter": "Active", "modelVersionFilter": "All Runs",
        "startTime": "ALL", "datasetsFilter": [], "runsExpanded": {}, "runsPinned": [], "runsHidden": [],
        "runsVisibilityMap": {}, "runsHiddenMode": "FIRST_10_RUNS", "groupBy": None, "groupsExpanded": {},
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "viewMaximized": False, "runListHidden": False,
        "compareRunCharts": _charts(),
        # Low enough for all four on one page.
        "compareRunSections": [{**_section(CHARTS, display=True), "columns": 2, "cardHeight": 240},
                               *(_section(name, display=False) for name in sections)],
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
    }  # fmt: skip


def searches_state() -> Mapping[str, Any]:
    """The state of the table of searches, the newest first. MLflow folds their candidates below them (the plus sign)."""
    columns = {f"tags.`{name}`": width for name, width in SEARCH_COLUMNS.items()}
    widths = {"attributes.`Run Name`": 190, "runDateAndNestInfo": 130, **columns}
    return {
        **view_state(),
        "searchFilter": " and ".join(["tags.\"quantline.current\" = 'true'", "tags.\"state\" LIKE '%'"]),
        "orderByKey": "attributes.start_time", "orderByAsc": False,
        "selectedColumns": list(columns), "columnOrder": list(widths), "columnWidths": widths,
    }  # fmt: skip


def sections_of(metrics: Iterable[str], before: str | None) -> list[str]:
    """The sections into which MLflow sorts its own charts of metrics, by what is before the last slash of their names.

    before: the saved state of the view, whose sections are kept; None if there is none.
    """
    known = json.loads(before).get("compareRunSections") or [] if before else []
    found = {section["name"] for section in known if section["name"] != CHARTS}
    return sorted(found | {name.rpartition("/")[0] or "Model metrics" for name in metrics})


def _section(name: str, *, display: bool) -> dict[str, Any]:
    return {"uuid": f"quantline {name}", "name": name, "display": display, "isReordered": True, "deleted": False}


def _charts() -> list[dict[str, Any]]:
    """Change of perplexity against size, and the change, the KL divergence and the speed of each variant."""
    common = {
        "metricSectionId": f"quantline {CHARTS}",
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 20,
    }
    axes = {axis: {"key": metric_name(figure), "type": "METRIC"} for axis, figure in
            (("xaxis", "size_mb"), ("yaxis", "change_percent"))}  # fmt: skip
    bars = ("change_percent", "kl", "tok_s")
    return [
        {**common, "uuid": "quantline scatter", "type": "SCATTER", **axes},
        *({**common, "uuid": f"quantline {name}", "type": "BAR", "metricKey": metric_name(name)} for name in bars),
    ]
