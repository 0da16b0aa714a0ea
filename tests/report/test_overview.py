"""The page over all models, made of the reports of each."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_records

from quantline.config.report import ReportConfig
from quantline.core.errors import UserError
from quantline.report.build import build
from quantline.report.evidence import of_model, report_folder
from quantline.report.overview import cell_of, read_report, variants_of, write_overview


def frozen_as(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {**config, "frozen": {**(config.get("frozen") or {}), "variant": name}}


@pytest.fixture(scope="module")
def made(rules: ReportConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models: `big` with all variants, `small` with one, which does not meet the rules."""
    root = tmp_path_factory.mktemp("overview")
    for model, names in {"big": None, "small": ["gptq-w2-g128"]}.items():
        folder = root / model
        records = report_records.records(folder, **({"names": names} if names else {}))
        named = [
            replace(record, name=f"{model}/{record.name}", config=frozen_as(record.config, f"{model}/{record.name}"))
            for record in records
        ]
        out = report_folder(root / "report", model)
        out.mkdir(parents=True)
        build(of_model(named, model), folder / "artifacts", rules, out)
    write_overview(root, ["big", "small"])
    return root


def test_every_model_has_its_recommendation_and_a_link_to_its_report(made: Path) -> None:
    page, text = (made / "report" / "index.html").read_text(), (made / "report" / "report.md").read_text()
    assert "big: ship <code>gptq-w4-g128</code>." in page
    assert "small: keep serving the float model." in page
    for model in ("big", "small"):
        assert f'href="models/{model}/index.html"' in page
        assert f"(models/{model}/report.md)" in text
        assert (made / "report" / "models" / model / "index.html").is_file()
    assert json.loads((made / "metrics.json").read_text()) == {"best": {"big": "gptq-w4-g128", "small": "none"}}


def test_a_cell_has_what_the_models_report_says(made: Path) -> None:
    big, small = (read_report(made / "report", name) for name in ("big", "small"))
    assert variants_of([small, big])[0] == "gptq-w2-g128"
    cell = cell_of(big, "awq-w4-g128")
    assert cell is not None
    assert cell.change == "+2.46 % [+2.28, +2.65]"
    assert (cell.size, cell.served, cell.chosen) == ("7.26 MB", True, False)
    assert cell_of(small, "awq-w4-g128") is None
    assert "no such pair" in (made / "report" / "index.html").read_text()


def test_the_tables_that_dvc_draws_have_all_models(made: Path) -> None:
    with (made / "report" / "data" / "variants.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {row["variant"] for row in rows}
    assert {"big/float", "big/awq-w4-g128", "small/float", "small/gptq-w2-g128"} <= names
    for name in ("layers", "speed"):
        with (made / "report" / "data" / f"{name}.csv").open(newline="") as file:
            assert {row["variant"].partition("/")[0] for row in csv.DictReader(file)} == {"big", "small"}


def test_a_models_report_is_about_it_alone_and_leads_back(made: Path) -> None:
    page = (made / "report" / "models" / "big" / "index.html").read_text()
    assert 'href="../../index.html"' in page
    assert "Ship <code>gptq-w4-g128</code>." in page
    rows = json.loads((made / "report" / "models" / "big" / "data" / "serving.json").read_text())
    assert "python -m stages.serve variant=big/awq-w4-g128" in {row["here"] for row in rows}
    commands = json.loads((made / "report" / "models" / "big" / "data" / "commands.json").read_text())
    assert any("evaluate@big-awq-w4-g128" in row["command"] for row in commands)
    assert any("evaluate_baseline@big" in row["command"] for row in commands)


def test_a_missing_report_is_named_with_the_remedy(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "report", tmp_path / "report")
    shutil.rmtree(tmp_path / "report" / "models" / "small")
    with pytest.raises(UserError, match=r"models/small/.*run `dvc repro`"):
        write_overview(tmp_path, ["big", "small"])
