"""The columns and figures of MLflow's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from variant_records import four

from quantline.lifecycle.tracking.view import COLUMNS, columns_of, figure_metrics, sections_of, view_state
from quantline.pipeline.figures import measured


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {record.name: measured(record) for record in four(tmp_path)}


def test_columns_are_texts_for_reading_in_the_order_of_the_table(rows: dict[str, dict[str, Any]]) -> None:
    assert list(columns_of(rows["awq-w4-g128"]).items()) == [
        ("method", "awq"), ("bits", "4"), ("group", "128"), ("change of perplexity", "+1.24 % [+0.99, +1.55]"), ("KL", "-"),
        ("size", "2.50 MB"), ("speed-up", "1.32x"), ("served", "yes"), ("alarms", "-"),
    ]  # fmt: skip
    assert columns_of(rows["gptq-w8-g128"])["served"] == "no"
    baseline = columns_of(rows["float"])
    assert (baseline["bits"], baseline["change of perplexity"]) == ("-", "baseline")


def test_kl_has_three_digits_and_alarms_are_counted(rows: dict[str, dict[str, Any]]) -> None:
    row = {**rows["awq-w4-g128"], "kl_divergence": 0.026125830248788916, "alarms": 2.0}
    assert (columns_of(row)["KL"], columns_of(row)["alarms"]) == ("0.026", "2")


def test_figures_are_rounded_metrics_in_groups_that_sort_before_all_others(rows: dict[str, dict[str, Any]]) -> None:
    assert figure_metrics(rows["awq-w4-g128"]) == {
        "1 quality/change_percent": 1.239, "1 quality/low": 0.99, "1 quality/high": 1.551, "1 quality/perplexity": 21.62,
        "2 size/size_mb": 2.503, "3 serving/served": 1.0, "3 serving/speed_up": 1.32, "3 serving/tok_s": 196.0,
    }  # fmt: skip
    assert figure_metrics(rows["gptq-w8-g128"])["3 serving/served"] == 0.0


def test_view_shows_the_columns_in_their_order_and_each_as_wide_as_its_text() -> None:
    state = view_state()
    columns = [f"tags.`{name}`" for name in COLUMNS]
    assert state["selectedColumns"] == columns
    assert [name for name in state["columnOrder"] if name.startswith("tags")] == columns
    assert sum(state["columnWidths"].values()) < 1170, (
        "the width of the table in a window of 1400 pixels, without the boxes"
    )
    assert set(state["columnOrder"]) == set(state["columnWidths"])


def test_four_charts_come_first_and_all_others_are_folded(rows: dict[str, dict[str, Any]]) -> None:
    metrics = figure_metrics(rows["awq-w4-g128"])
    state = view_state(sections_of([*metrics, "download/files", "tasks/task/word/vllm", "size_bytes"], None))
    first, *others = state["compareRunSections"]
    assert first["display"]
    assert len(state["compareRunCharts"]) == 4
    for chart in state["compareRunCharts"]:
        assert chart["metricSectionId"] == first["uuid"]
        keys = {chart["metricKey"]} if "metricKey" in chart else {chart["xaxis"]["key"], chart["yaxis"]["key"]}
        assert keys <= {*metrics, "1 quality/kl"}
    assert [section["name"] for section in others if not section["display"]] == [
        "1 quality", "2 size", "3 serving", "Model metrics", "download", "tasks/task/word",
    ]  # fmt: skip


def test_sections_of_an_earlier_publish_stay_folded() -> None:
    before = json.dumps(view_state(["tasks"]))
    assert sections_of(["speed/rounds"], before) == ["speed", "tasks"]
