"""How variants were chosen, as the report shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import report_records

from quantline.config.report import ReportConfig
from quantline.pipeline.records import VariantRecord
from quantline.report import choice
from quantline.report.build import build
from quantline.report.evidence import Evidence, gather
from tests.planning.test_search_record import record


def chosen_records(folder: Path, **more: Any) -> list[VariantRecord]:
    """A variant with rules by layer that were chosen from losses, and one without."""
    found = report_records.records(folder, names=["gptq-w4-g128", "gptq-w3-g128"])
    report_records.choose(found[1], folder / "artifacts", **more)
    return found


def of(folder: Path, **more: Any) -> list[Evidence]:
    return gather(chosen_records(folder, **more), folder / "artifacts")


def test_the_chosen_width_of_a_unit_is_that_of_its_rule_or_the_variants_own(tmp_path: Path) -> None:
    rows = choice.losses(of(tmp_path)).rows
    widths = {row["unit"]: row["bits"] for row in rows if row["chosen"]}
    assert len(widths) == sum(row["chosen"] for row in rows) == 5 * len(report_records.UNITS)
    assert {unit for unit, bits in widths.items() if bits == 16} == {"model.layers.1.self_attn.q_proj+k_proj+v_proj"}
    assert {bits for unit, bits in widths.items() if unit.endswith("down_proj")} == {8}
    assert {bits for unit, bits in widths.items() if unit.endswith(("o_proj", "up_proj"))} == {4}
    assert {row["variant"] for row in rows} == {"gptq-w4-g128"}


def test_each_chosen_width_is_framed_and_small_losses_are_pale(tmp_path: Path) -> None:
    (plot,) = choice.heat_maps(of(tmp_path))
    assert plot.drawn.count("stroke-width: 2.2") == 5 * len(report_records.UNITS)
    # By hand: 4 bits lose 4**-3 * (13 + 2 * 15 + 3 * 15), the first without the skipped one; 8 bits 4**-7 * 4 * 15.
    assert "(framed) is 1.38 nats" in plot.caption
    mesh = plot.drawn[plot.drawn.index("QuadMesh_1") :]
    colours = re.findall(r"fill: #([0-9a-f]{6})", mesh[: mesh.index("</g>")])
    light = [sum(int(one[at : at + 2], 16) for at in (0, 2, 4)) / 765 for one in colours]
    assert light[3 * 5] > 0.85  # the first layer's queries at 8 bits
    assert light[0] < 0.4  # at 2 bits


def test_a_deep_model_fits_a_window_of_1400_pixels_and_has_no_numbers(tmp_path: Path) -> None:
    (plot,) = choice.heat_maps(of(tmp_path, layers=80))
    assert plot.width <= 1250
    assert plot.drawn.count("<text") < 80


def test_an_edited_line_is_not_explained_by_what_chose_another(tmp_path: Path, rules: ReportConfig) -> None:
    records = chosen_records(tmp_path)
    edited = [VariantRecord(one.name, one.config, one.overrides.replace("bits=4", "bits=3"), one.results, one.folder)
              for one in records]  # fmt: skip
    assert choice.losses(gather(edited, tmp_path / "artifacts")).rows == []
    build(edited, tmp_path / "artifacts", rules, tmp_path / "edited")
    build(records, tmp_path / "artifacts", rules, tmp_path / "own")
    for name in ("index.html", "report.md"):
        assert "How were they chosen?" in (tmp_path / "own" / name).read_text()
        assert "How were they chosen?" not in (tmp_path / "edited" / name).read_text()


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.0123, "0.012"), (0.000123, "1.2e-4"), (1.5, "1.5")])
def test_numbers_in_cells_are_short(value: float, text: str) -> None:
    assert choice._short(value) == text


def test_a_search_is_told_with_its_goal_its_front_and_what_was_not_tried(tmp_path: Path, rules: ReportConfig) -> None:
    records = chosen_records(tmp_path, search={**record(), "started": None, "seconds": None})
    build(records, tmp_path / "artifacts", rules, tmp_path / "report")
    for name in ("index.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "the smallest variant whose perplexity grows by at most 1 %" in text
        assert "its whole interval is beyond 1 % on 8 of 24 documents" in text
        assert "awq takes 4" in text
    assert "rtn-6" in (tmp_path / "report" / "plots" / "front-gptq-w4-g128.svg").read_text()


def test_the_front_is_drawn_with_limits_and_those_decided_early_are_hollow() -> None:
    plot = choice.front(record(), "small")
    assert plot is not None
    assert plot.drawn.count("<title>") == 1 + 4  # the limit, and each measured candidate
    assert "limit: 1 %" in plot.drawn
    assert "The answer is rtn-6 (ring)." in plot.caption
    assert choice.front({**record(), "candidates": []}, "none") is None


def test_a_search_is_written_as_tables_and_a_picture(tmp_path: Path) -> None:
    files = choice.write_search(record(), tmp_path / "new" / "folder")
    assert set(files) == {"record.json", "candidates.csv", "front.csv", "front.svg"}
    names = [line.partition(",")[0] for line in files["front.csv"].read_text().splitlines()]
    assert names == ["name", "rtn-w4", "rtn-5", "rtn-6", "rtn-w8"]
