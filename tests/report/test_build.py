from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_records
from drill_results import drill

from quantline.config.report import ReportConfig
from quantline.core.errors import UserError
from quantline.report import run_tables, svg, tables
from quantline.report.build import _alarm_advice, build, compile_report
from quantline.report.evidence import current_report, gather, made_of


@pytest.fixture(scope="module")
def whole(rules: ReportConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of five variants, every instrument measured."""
    folder = tmp_path_factory.mktemp("whole")
    records = report_records.records(folder)
    build(records, folder / "artifacts", rules, folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def bare(rules: ReportConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one variant of which the newer instruments measured nothing."""
    folder = tmp_path_factory.mktemp("bare")
    records = report_records.records(folder, whole=False, names=["gptq-w4-g128"])
    build(records, folder / "artifacts", rules, folder / "report")
    return folder / "report"


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / "data" / f"{name}.json").read_text())


def test_the_recommended_variant_leads_both_documents_with_its_reasons(whole: Path) -> None:
    page, text = (whole / "index.html").read_text(), (whole / "report.md").read_text()
    assert "Ship <code>gptq-w4-g128</code>." in page
    assert text.splitlines()[2] == "**Ship gptq-w4-g128.**"
    for document in (page.replace("&#39;", "'"), text):
        assert "perplexity +2.21 % [+2.04, +2.37], 2.58x smaller on disk" in document
        assert (
            "By the upper end of its interval, the perplexity grows by 2.37 % (at most 3.00 % is allowed)" in document
        )
        assert "vLLM does not serve it here: vLLM 0.32.0 on CPU serves GPTQ of 4 bits only" in document


def test_what_was_served_is_shown_with_its_lines_and_nothing_else(whole: Path) -> None:
    found = {row["variant"]: row for row in rows(whole, "serving")}
    assert found.keys() == {"float", "awq-w4-g128", "gptq-w4-g128", "gptq-w3-g128", "gptq-w2-g128"}
    assert found["awq-w4-g128"]["here"] == "python -m stages.serve variant=awq-w4-g128"
    assert found["awq-w4-g128"]["elsewhere"].startswith("vllm serve . --dtype float16 ")
    assert found["float"]["elsewhere"].startswith("vllm serve . --dtype bfloat16 ")
    for document in ("index.html", "report.md"):
        assert "vllm serve . --dtype float16 " in (whole / document).read_text()


def test_alarms_stand_before_everything_but_the_recommendation(whole: Path) -> None:
    page = (whole / "index.html").read_text()
    assert page.index('id="recommendation"') < page.index("Alarms: gptq-w2-g128") < page.index('id="glance"')
    assert "its output error is beyond what 2 bits explain" in (whole / "report.md").read_text()
    assert [row["variant"] for row in rows(whole, "alarms")] == ["gptq-w2-g128"]


def test_every_table_is_a_csv_and_a_json_of_the_same_rows(whole: Path) -> None:
    found = sorted(path.stem for path in (whole / "data").glob("*.csv"))
    assert {"variants", "quality", "tasks", "layers", "restored", "speed", "memory", "protocol", "commands"} <= set(
        found
    )
    for name in found:
        with (whole / "data" / f"{name}.csv").open(newline="") as file:
            written = list(csv.DictReader(file))
        assert len(written) == len(rows(whole, name)) > 0, name
        for text, value in zip(written, rows(whole, name), strict=True):
            for key, cell in value.items():
                assert text[key] == ("" if cell is None else str(cell)), (name, key)


def test_values_are_those_of_the_results_in_base_units(whole: Path) -> None:
    (row,) = [row for row in rows(whole, "variants") if row["variant"] == "awq-w4-g128"]
    assert row["size_bytes"] == 7.26e6
    assert row["difference_percent"] == pytest.approx(2.46)
    assert row["speed_up"] == pytest.approx((1.31 * 1.12 * 0.88) ** (1 / 3))
    assert row["slower_than_float"] is True
    assert row["verdict"] == "worse"
    assert len(rows(whole, "layers")) == 5 * 35
    assert len(rows(whole, "worst_layers")) == 5 * 5


def test_equal_results_give_equal_bytes(whole: Path, rules: ReportConfig, tmp_path: Path) -> None:
    build(report_records.records(tmp_path), tmp_path / "artifacts", rules, tmp_path / "report")
    names = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file())
    assert len(names) > 40
    assert [name for name in names if (whole / name).read_bytes() != (tmp_path / "report" / name).read_bytes()] == []


def test_missing_measurements_are_named(bare: Path) -> None:
    page, text = (bare / "index.html").read_text(), (bare / "report.md").read_text()
    for document in (page, text):
        assert document.lower().count("not measured") >= 8
        assert "nan" not in re.sub(r"<[^>]+>|[\w+/=]{60,}", "", document).lower().split()
    assert "not checked" in page
    assert {path.stem for path in (bare / "plots").iterdir()} == {
        "quality-size", "distances", "errors-gptq-w4-g128", "memory"
    }  # fmt: skip
    assert "Recovery on tasks: not measured, so this rule was not applied." in text


def test_plots_are_drawings_with_titles_and_ids_of_their_own(whole: Path) -> None:
    page = (whole / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    for path in (whole / "plots").iterdir():
        drawing = ElementTree.fromstring(path.read_text())  # it is well-formed
        assert drawing.find("{http://www.w3.org/2000/svg}title") is not None
    assert not re.search("|".join(drawn for drawn, _ in svg.INK.values()), page)


def test_the_page_makes_no_network_requests(whole: Path) -> None:
    page = (whole / "index.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#|data:|data/|report\.md)[^"]*"', page) == []


def test_text_of_a_result_is_no_markup(rules: ReportConfig, tmp_path: Path) -> None:
    records = report_records.records(tmp_path, whole=False, names=["gptq-w4-g128"])
    records[1].results[2]["warnings"] = ["<script>alert(1)</script> | a bar"]
    build(records, tmp_path / "artifacts", rules, tmp_path / "report")
    assert "<script" not in (tmp_path / "report" / "index.html").read_text()
    (line,) = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "alert(1)" in line]
    assert "<script" not in line
    assert line.replace("\\|", "").count("|") == 5


def test_options_that_differ_are_listed_per_variant(tmp_path: Path) -> None:
    records = report_records.records(tmp_path, whole=False, names=["gptq-w4-g128", "awq-w4-g128"])
    records[1].config["calibration"]["n_samples"] = 8
    found = [row for row in run_tables.protocol(gather(records, tmp_path)).rows if row["option"] == "n_samples"]
    assert [(row["value"], row["variants"]) for row in found] == [("32", "float, awq-w4-g128"), ("8", "gptq-w4-g128")]


def test_speeds_without_a_server_have_a_table_only_where_they_were_measured(
    rules: ReportConfig, tmp_path: Path, bare: Path
) -> None:
    records = report_records.records(tmp_path, names=["gptq-w4-g128"])
    path = tmp_path / "artifacts" / "gptq-w4-g128" / "speed" / "speed.json"
    row = {
        "model": "variant", "library": "gptqmodel", "linear": "TorchAtenLinear", "attention": "eager", "fuse": False,
        "load_seconds": 10.0, "memory_before": 5e8, "memory_after": 6e8, "tokens_per_second": 77.5, "device": "cpu",
        "environment": "gptqmodel", "answers": [{}] * 5,
    }  # fmt: skip
    report_records.write(path, {"rows": [], "ratios": [], "servers": [], "session": {}, "library": [row]})
    build(records, tmp_path / "artifacts", rules, tmp_path / "report")
    (found,) = rows(tmp_path / "report", "library")
    assert (found["variant"], found["tokens_per_second"], found["questions"]) == ("gptq-w4-g128", 77.5, 5)
    for document in ("index.html", "report.md"):
        assert "TorchAtenLinear" in (tmp_path / "report" / document).read_text()
        assert "by each model’s own library" not in (bare / document).read_text()


def test_the_report_says_what_faults_cost_the_fleet_and_nothing_of_one_where_none_was_tried(
    rules: ReportConfig, tmp_path: Path, bare: Path
) -> None:
    records = report_records.records(tmp_path, whole=False, names=["gptq-w4-g128"])
    home, heading = tmp_path / "artifacts", "Does the fleet lose requests?"
    found = drill({"gptq-w4-g128": "a", "float": "f"})
    build(records, home, rules, tmp_path / "report", found)
    for document in ("index.html", "report.md"):
        text = (tmp_path / "report" / document).read_text().replace("&gt;", ">")
        assert heading in text
        assert "the precision low, gptq-w4-g128 -> float, on cpu" in text
        assert "not in time" in text
        assert heading not in (bare / document).read_text()
    assert [row["lost"] for row in rows(tmp_path / "report", "fleet")] == [0, 1]
    build(records, home, rules, tmp_path / "other", {"status": "refused", "reason": "no precision has two"})
    assert "It cannot run here: no precision has two" in (tmp_path / "other" / "report.md").read_text()


def test_a_report_of_other_results_is_not_current(tmp_path: Path) -> None:
    records = report_records.records(tmp_path, whole=False, names=["gptq-w4-g128"])
    assert current_report(tmp_path, records) is None
    manifest = tmp_path / "report" / "data" / "manifest.json"
    report_records.write(manifest, {"made_of": made_of(records)})
    assert current_report(tmp_path, records) == tmp_path / "report"
    records[1].results[-1]["metrics"]["nll_difference"] = 0.5
    assert current_report(tmp_path, records) is None


def test_a_report_on_nothing_says_what_to_do(rules: ReportConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `dvc repro` first"):
        build([], tmp_path, rules, tmp_path / "report")


def test_the_baseline_alone_is_reported_on(rules: ReportConfig, tmp_path: Path) -> None:
    records = report_records.records(tmp_path, whole=False, names=[])
    report = compile_report(gather(records, tmp_path / "artifacts"), rules)
    assert report.recommendation.headline == "None: no variant has been built yet."


def test_a_gate_without_a_limit_is_not_a_pass(tmp_path: Path) -> None:
    def passed(rows: int, limit: float | None) -> object:
        (record,) = report_records.records(tmp_path, names=["gptq-w4-g128"])[1:]
        path = tmp_path / "artifacts" / "gptq-w4-g128" / "tasks" / "tasks.json"
        known = json.loads(path.read_text())
        report_records.write(
            path, {"rows": known["rows"][:rows], "gate": {"passed": True, "limit": limit, "failed": []}}
        )
        return tables.variants(gather([record], tmp_path / "artifacts")).rows[0]["tasks_passed"]

    assert [passed(2, 0.9), passed(2, None), passed(0, 0.9)] == [True, None, None]


def test_speeds_that_the_stage_disowns_are_not_shown(tmp_path: Path, rules: ReportConfig) -> None:
    records = report_records.records(tmp_path, names=["gptq-w4-g128"])
    path = tmp_path / "artifacts" / "gptq-w4-g128" / "speed" / "speed.json"
    measured = json.loads(path.read_text())
    path.write_text(json.dumps({**measured, "session": {**measured["session"], "cores_in_use": 900.0}}))
    report = compile_report(gather(records, tmp_path / "artifacts"), rules)
    assert report.tables["speed"].rows == []
    assert (
        "Left out: gptq-w4-g128: tokens/s and times, since other programs used the machine"
        in report.tables["speed"].absent
    )
    assert "speed" not in report.plots
    assert len(report.tables["speed_ratios"].rows) == 3


def test_the_model_is_called_by_its_name(whole: Path) -> None:
    assert (whole / "report.md").read_text().startswith("# Which variant of demo to ship")
    assert "Which variant of <em>demo</em> to ship" in (whole / "index.html").read_text()


def test_few_documents_are_told_of_beside_the_intervals(tmp_path: Path) -> None:
    records = report_records.records(tmp_path, names=["gptq-w4-g128"])
    for record in records:
        for result in record.results:
            if result["stage"] == "evaluate":
                result["metrics"]["documents"] = 13
    caption = tables.quality(gather(records, tmp_path / "artifacts")).caption
    assert "Caution: the intervals rest on 13 documents only" in caption


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ([8, 8], "At 8 bits that is rounding only where a limit does not suit this model"),
        ([4], "and try 8 bits or layers=attention8_mlp4."),
        ([2, 3], "and try 4 bits."),
        ([8, 4], "and try 8 bits or layers=attention8_mlp4."),
    ],
)
def test_what_to_do_about_alarms_follows_from_the_bits_of_the_variants(bits: list[int], said: str) -> None:
    assert said in _alarm_advice([{"bits": width} for width in bits])


def test_the_worst_group_of_documents_stands_beside_the_mean(tmp_path: Path, rules: ReportConfig) -> None:
    records = report_records.records(tmp_path, names=["gptq-w4-g128"])
    assert "worst group" not in [column.label for column in tables.quality(gather(records, tmp_path)).columns]
    evaluated = next(result for result in records[1].results if result["stage"] == "evaluate")
    evaluated["metrics"].update(worst_group_difference=0.05, worst_group_low=0.03, worst_group_high=0.07)
    report_records.write_csv(tmp_path / "artifacts" / "gptq-w4-g128" / "evaluate" / "groups.csv", [
        {"group": name, "documents": 9, "nll_difference": loss, "nll_low": loss - 0.02, "nll_high": loss + 0.02}
        for name, loss in (("rust", 0.05), ("sql", 0.01))
    ])  # fmt: skip
    build(records, tmp_path / "artifacts", rules, tmp_path / "report")
    for name in ("index.html", "report.md"):
        text = re.sub(r"</?span[^>]*>", "", (tmp_path / "report" / name).read_text())
        assert text.count("+5.13 % [+3.05, +7.25]") == 2, "beside the mean, and in the table of groups"
        assert "+1.01 % [-1.00, +3.05]" in text
