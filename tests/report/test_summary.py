from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from variant_records import REFUSED, four

from quantline.pipeline.records import VariantRecord
from quantline.report.summary import render_table, variant_table


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return variant_table(four(tmp_path))


def one(metrics: dict[str, Any], **config: Any) -> dict[str, Any]:
    result = {"stage": "evaluate", "status": "ok", "metrics": metrics}
    values = {"method": {"name": "gptq"}, "bits": 4, "group_size": 128, **config}
    return variant_table([VariantRecord("v", values, "", [result], Path())])[0]


def test_rows_are_plain_values_in_base_units(rows: list[dict[str, Any]]) -> None:
    awq = next(row for row in rows if row["variant"] == "awq-w4-g128")
    assert json.loads(json.dumps(rows)) == rows
    assert (awq["method"], awq["bits"], awq["group_size"], awq["served"]) == ("awq", 4, 128, True)
    assert awq["size_bytes"] == 2_503_200
    assert awq["output_tokens_per_second"] == 196.5


def test_float_baseline_comes_first_and_has_no_width_and_no_difference(tmp_path: Path) -> None:
    rows = variant_table(list(reversed(four(tmp_path))))
    assert [row["variant"] for row in rows] == ["float", "gptq-w8-g128", "gptq-w4-g128", "awq-w4-g128"]
    assert [rows[0][key] for key in ("bits", "group_size", "difference_percent")] == [None, None, None]
    assert "baseline" in render_table(rows).splitlines()[2]


def test_difference_is_the_growth_of_the_perplexity_with_its_interval() -> None:
    # exp(ln 1.02) is 1.02: 2 % more perplexity.
    row = one({f"nll_difference{end}": math.log(x) for end, x in (("", 1.02), ("_low", 1.01), ("_high", 1.04))})
    assert row["difference_percent"] == pytest.approx(2.0)
    assert row["difference_low_percent"] == pytest.approx(1.0)
    assert row["difference_high_percent"] == pytest.approx(4.0)
    assert "+2.00 % [+1.00, +4.00]" in render_table([row])


def test_difference_without_an_interval_comes_from_the_ratio() -> None:
    assert "+2.50 % " in render_table([one({"perplexity_ratio": 1.025})])


def test_small_difference_keeps_its_decimals_and_a_negative_one_its_sign() -> None:
    metrics = {"nll_difference": -0.0003, "nll_difference_low": -0.0005, "nll_difference_high": 0.0001}
    assert "-0.030 % [-0.050, +0.010]" in render_table([one(metrics)])


def test_broken_variant_with_an_enormous_perplexity_still_fits() -> None:
    row = one({"nll_difference": 900.0, "reference_perplexity": 1.2e12})
    text = render_table([row])
    assert "+inf %" in text
    assert "1.20e+12" in text


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    empty = VariantRecord("v", {}, "", [], tmp_path)
    cells = render_table(variant_table([empty])).splitlines()[2].split()
    assert cells == ["v", *["-"] * 12]
    assert variant_table([]) == []
    assert "variant" in render_table([])


def test_group_of_a_whole_channel_is_named() -> None:
    assert " channel " in render_table([one({}, group_size=-1)])


def test_refusal_is_short_in_the_table_and_full_below(rows: list[dict[str, Any]]) -> None:
    text = render_table(rows)
    assert "no: vLLM 0.32.0... [1]" in text
    assert text.splitlines()[-1] == f"[1] gptq-w8-g128, serve_smoke: {REFUSED}"
    refused = next(row for row in rows if row["variant"] == "gptq-w8-g128")
    assert refused["vllm_perplexity"] is None
    assert refused["perplexity"] is not None


def test_stages_with_one_reason_share_a_footnote(rows: list[dict[str, Any]]) -> None:
    refused = next(row for row in rows if row["variant"] == "gptq-w8-g128")
    refused["reasons"] = {"serve_smoke": REFUSED, "speed": REFUSED, "tasks": "another"}
    assert render_table([refused]).splitlines()[-2:] == [
        f"[1] gptq-w8-g128, serve_smoke and speed: {REFUSED}",
        "[2] gptq-w8-g128, tasks: another",
    ]


def test_variant_that_could_not_be_quantized_is_not_served() -> None:
    result = {"stage": "quantize", "status": "unsupported", "reason": "phi3 with\ngrouped heads"}
    text = render_table(variant_table([VariantRecord("phi", {}, "", [result], Path())]))
    assert "no: phi3 with... [1]" in text
    assert "[1] phi, quantize: phi3 with grouped heads" in text


def test_table_fits_about_150_columns_with_long_names(rows: list[dict[str, Any]]) -> None:
    rows[1]["variant"] = "gptq-w4-g1024-act-sym"
    rows[1].update(difference_percent=12345.678, difference_low_percent=12000.1, difference_high_percent=13000.2)
    table = render_table(rows).split("\n\n")[0]
    assert max(len(line) for line in table.splitlines()) <= 152


def test_github_style_is_a_markdown_table_of_13_columns(rows: list[dict[str, Any]]) -> None:
    lines = render_table(rows, style="github").split("\n\n")[0].splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {14}


def test_bar_in_a_reason_does_not_break_the_markdown_table() -> None:
    result = {"stage": "serve_smoke", "status": "unsupported", "reason": "a|b"}
    text = render_table(variant_table([VariantRecord("v", {}, "", [result], Path())]), style="github")
    assert text.split("\n\n")[0].splitlines()[-1].replace("\\|", "").count("|") == 14
