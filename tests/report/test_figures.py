"""The figures for DVC's tables, and what DVC makes of them by this project's dvc.yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_records
import yaml

from quantline.config.report import ReportConfig
from quantline.report.build import build
from quantline.report.figures import best_of, write_figures

COLUMNS = 120
NAMES = ("awq-w4-g128", "gptq-w4-g128", "gptq-w8-g128")


@pytest.fixture(scope="module")
def written(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report and its figures."""
    folder = tmp_path_factory.mktemp("figures")
    rules = ReportConfig.model_validate(yaml.safe_load((root / "conf" / "report" / "default.yaml").read_text()))
    (folder / "report").mkdir()
    records = report_records.records(folder / "results", names=NAMES)
    write_figures(build(records, folder / "results" / "artifacts", rules, folder / "report"), folder)
    shutil.rmtree(folder / "results")
    return folder


def figures(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_every_variant_has_a_file_of_its_figures(written: Path) -> None:
    assert {path.name for path in (written / "metrics").iterdir()} == {"float", *NAMES}
    assert figures(written, "metrics/awq-w4-g128") == {
        "change_percent": 2.46, "size_mb": 7.26, "served": "yes", "low": 2.28, "high": 2.65, "kl": 0.019,
        "perplexity": 12.96, "tok_s": 196.0,
    }  # fmt: skip


def test_what_was_not_measured_is_left_out(written: Path) -> None:
    refused = figures(written, "metrics/gptq-w8-g128")
    assert refused["served"] == "no"
    assert "tok_s" not in refused
    assert not {"change_percent", "low", "high", "kl"} & set(figures(written, "metrics/float"))


def test_the_variant_to_ship_comes_first_with_its_name_and_figures(written: Path) -> None:
    best = figures(written, "metrics.json")
    assert next(iter(best.items())) == ("best", "gptq-w4-g128")
    assert {key: value for key, value in best.items() if key != "best"} == figures(written, "metrics/gptq-w4-g128")


def test_no_variant_to_ship_is_said() -> None:
    assert best_of({"awq-w4-g128": {"change_percent": 20.0}}, None) == {"best": "none"}


@pytest.fixture(scope="module")
def tracked(root: Path, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with dvc.yaml, the templates of its plots, a report and figures."""
    folder = tmp_path_factory.mktemp("tracked") / "project"
    shutil.copytree(written, folder)
    for name in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", ".gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(root / name, folder / name)
    shutil.copytree(root / ".dvc" / "plots", folder / ".dvc" / "plots")
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "first")
    return folder


def run(folder: Path, *command: str, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_", "COLUMNS"))}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**kept, "DVC_NO_ANALYTICS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments, COLUMNS=str(COLUMNS))


def widest(text: str) -> int:
    return max(len(line) for line in text.splitlines())


@pytest.mark.e2e
def test_dvc_shows_a_row_a_variant_in_the_width_of_a_terminal(tracked: Path) -> None:
    shown = dvc(tracked, "metrics", "show")
    assert widest(shown) <= COLUMNS
    assert [line.split()[0] for line in shown.splitlines()] == [
        "Path", "metrics.json", *(f"metrics/{name}" for name in sorted(["float", *NAMES]))
    ]  # fmt: skip
    assert shown.split("\n")[0].split() == [
        "Path", "best", "change_percent", "high", "kl", "low", "perplexity", "served", "size_mb", "tok_s"
    ]  # fmt: skip
    assert widest(dvc(tracked, "metrics", "diff")) <= COLUMNS


@pytest.mark.e2e
def test_the_variant_to_ship_stands_in_the_first_columns_of_the_experiments(tracked: Path) -> None:
    """The pager cuts lines at the terminal's width, so what matters has to be left of it."""
    heading, row = (line[:COLUMNS].split() for line in dvc(tracked, "exp", "show").splitlines()[1:4:2])
    assert heading[:5] == ["Experiment", "Created", "best", "metrics.json:change_percent", "metrics.json:size_mb"]
    assert (row[0], row[2:5]) == ("workspace", ["gptq-w4-g128", "2.21", "7.33"])


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("columns", "figures"),
    [
        (COLUMNS, ["metrics.json:change_percent", "metrics.json:size_mb", "metrics.json:kl"]),
        (80, ["metrics.json:change_percent"]),
    ],
)
def test_the_experiments_of_make_fit_the_terminal_with_nothing_cut(
    tracked: Path, root: Path, columns: int, figures: list[str]
) -> None:
    recipe = (root / "Makefile").read_text().partition("\nexperiments:")[2].partition("\n\n")[0].partition("\n")[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = recipe.strip().removeprefix("@").replace("$$", "$")
    shown = run(tracked, "sh", "-c", command, COLUMNS=str(columns), PATH=path)
    assert widest(shown) <= columns - 15  # an experiment's name is longer than a branch's
    assert "…" not in shown
    assert shown.splitlines()[1].split() == ["Experiment", "best", *figures]
    assert shown.splitlines()[3].split()[1] == "gptq-w4-g128"


@pytest.mark.e2e
def test_dvc_draws_quality_against_size_layer_errors_and_speed(tracked: Path) -> None:
    drawn = json.loads(dvc(tracked, "plots", "show", "--json"))["data"]
    values = {name: plot["content"]["data"]["values"] for name, (plot,) in drawn.items()}
    assert set(values) == {"quality-against-size", "layer-errors", "speed-by-batch"}
    assert {row["variant"]: row["size_bytes"] for row in values["quality-against-size"]}["awq-w4-g128"] == "7260000.0"
    assert {(row["variant"], row["layer"]) for row in values["layer-errors"]} >= {(name, "4") for name in NAMES}
    assert {row["concurrency"] for row in values["speed-by-batch"] if row["model"] == "variant"} == {"1", "8", "64"}
    for name, (plot,) in drawn.items():
        used = json.dumps({key: value for key, value in plot["content"].items() if key != "data"})
        assert "DVC_METRIC" not in used, name
        assert '"field": "variant"' in used or '"field": "series"' in used, name
    page = Path(dvc(tracked, "plots", "show").strip().removeprefix("file://"))
    assert page.read_text().count("vegaEmbed(") == len(drawn)


@pytest.mark.e2e
def test_what_the_view_in_vs_code_asks_has_the_variant_to_ship_first_and_every_plot(tracked: Path) -> None:
    """By the commands in the source of DVC's extension; it orders metrics as they come, before parameters."""
    workspace = json.loads(dvc(tracked, "exp", "show", "-n", "3", "--no-fetch", "--json"))[0]["data"]
    assert next(iter(workspace["metrics"])) == "metrics.json"
    assert list(workspace["metrics"]["metrics.json"]["data"])[:2] == ["best", "change_percent"]
    assert "params.yaml" in workspace["params"]
    drawn = json.loads(dvc(tracked, "plots", "diff", "-o", ".dvc/tmp/plots", "--split", "--json"))["data"]
    assert set(drawn) == {"quality-against-size", "layer-errors", "speed-by-batch"}
    for name, (plot,) in drawn.items():
        assert plot["type"] == "vega"
        assert plot["content"]["width"] in plot["anchor_definitions"], name  # which the viewer fills in
        assert plot["anchor_definitions"]["<DVC_METRIC_DATA>"], name
    assert isinstance(json.loads(dvc(tracked, "data", "status", "--granular", "--unchanged", "--json")), dict)
