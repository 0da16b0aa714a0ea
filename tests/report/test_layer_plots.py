from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import report_records

from quantline.config.report import ReportConfig
from quantline.report import layer_plots
from quantline.report.build import compile_report
from quantline.report.evidence import Evidence, gather
from quantline.report.tables import restored


def test_a_model_of_many_layers_is_drawn_without_numbers(tmp_path: Path) -> None:
    (_, item) = gather(report_records.records(tmp_path, names=["gptq-w4-g128"]), tmp_path / "artifacts")
    object.__setattr__(item, "layers", report_records.layer_rows(0.2, layers=60))
    (plot,) = layer_plots.heat_maps([item])
    assert plot.drawn.count("<text") < 60
    assert plot.width > 1000


def _item(folder: Path, name: str = "gptq-w4-g128") -> Evidence:
    return gather(report_records.records(folder, names=[name]), folder / "artifacts")[1]


def _lightness(drawn: str) -> list[float]:
    """Of each cell, 0 (black) to 1 (white), in their order."""
    mesh = drawn[drawn.index("QuadMesh_1") :]
    mesh = mesh[: mesh.index("</g>")]
    colours = re.findall(r"fill: #([0-9a-f]{6})", mesh)
    return [(0.299 * int(one[:2], 16) + 0.587 * int(one[2:4], 16) + 0.114 * int(one[4:], 16)) / 255 for one in colours]


def test_low_errors_are_pale_and_high_ones_dark_whatever_the_others_are(tmp_path: Path) -> None:
    item = _item(tmp_path)
    errors = [(0.002, "low"), (0.04, "low"), (0.09, "low"), (0.12, "moderate"), (0.3, "high"), (0.9, "high")]
    for shown in (errors, errors[:3], errors[2:5]):
        rows = [{**report_records.layer_rows(0.1)[0], "layer": at, "name": f"model.layers.{at}.mlp.up_proj",
                 "output_error": error} for at, (error, _) in enumerate(shown)]  # fmt: skip
        object.__setattr__(item, "layers", rows)
        (plot,) = layer_plots.heat_maps([item])
        found = _lightness(plot.drawn)
        assert found == sorted(found, reverse=True)
        for lightness, (error, level) in zip(found, shown, strict=True):
            assert lightness > 0.8 if level == "low" else lightness < 0.83, error
            assert lightness < 0.55 or level != "high", error


def test_a_share_that_is_not_told_from_zero_is_neither_in_the_table_nor_drawn(tmp_path: Path) -> None:
    item = _item(tmp_path)
    row = {"name": "model.layers.0.mlp.up_proj", "output_error": 0.2, "recovered_share": 0.3, "recovered_nll": 0.01}
    sure, unsure = (
        {**row, "recovered_low": 0.005, "recovered_high": 0.02},
        {**row, "recovered_low": -0.01, "recovered_high": 0.03},
    )
    object.__setattr__(item, "restored", [sure, unsure])
    table = restored([item])
    assert [found["recovered_share"] for found in table.rows] == [0.3, None]
    column = next(column for column in table.columns if column.key == "recovered_share")
    assert [column.text(found) for found in table.rows] == ["30.0 %", "not told from 0"]
    plot = layer_plots.restored(table.rows, {item.name: 1})
    assert plot is not None
    assert plot.description.count("30.0 %") == 1


def test_of_a_loss_that_is_not_told_from_zero_there_are_no_shares(tmp_path: Path) -> None:
    table = restored([_item(tmp_path, "gptq-w8-g128")])  # +0.006 % [-0.003, +0.015]
    assert table.rows
    assert {row["recovered_share"] for row in table.rows} == {None}


def test_long_names_leave_room_for_the_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: ReportConfig
) -> None:
    names = {"n" * 70 + name: values for name, values in report_records.VARIANTS.items()}
    monkeypatch.setattr(report_records, "VARIANTS", names)
    found = gather(report_records.records(tmp_path, names=list(names)), tmp_path / "artifacts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where an axis has no room left
        compile_report(found, rules)
