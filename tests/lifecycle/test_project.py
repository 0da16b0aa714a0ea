from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from quantline.core.errors import UserError
from quantline.lifecycle.project import create, goals
from quantline.pipeline.compose import compose_values, read_params, variant_overrides
from quantline.pipeline.config import parse
from quantline.pipeline.preflight import variant_spec
from quantline.planning.preflight import check
from quantline.planning.spec import Machine, Model
from quantline.serving.rules import Target, cpu_traits


def shared_of(folder):
    return yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["shared"].split("#")[0].split()


def test_a_project_has_all_that_the_pipeline_reads_and_a_repository(tmp_path, root):
    create(tmp_path / "new")
    assert (tmp_path / "new" / "conf" / "config.yaml").read_bytes() == (root / "conf" / "config.yaml").read_bytes()
    assert list(read_params(tmp_path / "new" / "params.yaml")["variants"]) == list(
        read_params(root / "params.yaml")["variants"]
    )
    assert shared_of(tmp_path / "new") == ["model=demo", "calibration=demo"]
    asked = ["git", "-C", str(tmp_path / "new"), "rev-parse", "--show-toplevel"]
    inside = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert inside.stdout.strip() == str(tmp_path / "new")


def test_the_current_folder_if_empty_becomes_the_project_and_stays_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    create(Path.cwd())
    assert Path("conf/config.yaml").is_file()  # by the same folder: another one in its place would not be found
    assert sorted(path.name for path in Path.cwd().iterdir()) == sorted(
        path.name for path in (tmp_path / "here").iterdir()
    )
    assert not Path(".new").exists()


def test_no_stage_depends_on_a_file_that_a_project_does_not_have(tmp_path):
    create(tmp_path / "new")
    stages = yaml.safe_load((tmp_path / "new" / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    files = {
        out if isinstance(out, str) else next(iter(out)) for stage in stages.values() for out in stage.get("outs", [])
    }
    for name, stage in stages.items():
        for dep in stage.get("do", stage).get("deps", []):
            made = dep in files or dep.split("/")[0] in ("artifacts", "variants")
            assert made or (tmp_path / "new" / dep).exists(), (name, dep)
    assert stages["code"]["always_changed"]


def test_a_project_has_the_templates_of_its_plots(tmp_path):
    create(tmp_path / "new")
    plots = yaml.safe_load((tmp_path / "new" / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    templates = [plot["template"] for entry in plots for plot in entry.values()]
    assert len(templates) == 3
    for name in templates:
        assert (tmp_path / "new" / ".dvc" / "plots" / f"{name}.json").is_file(), name


def test_a_project_about_an_own_model_and_text_has_no_demo(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "my text.jsonl").write_text('{"text": "a"}\n')
    create(tmp_path / "new", model=str(tmp_path / "model"), calibration=str(tmp_path / "my text.jsonl"))
    line = (tmp_path / "new" / "params.yaml").read_text(encoding="utf-8")
    assert f"shared: model=custom model.path={tmp_path}/model calibration=jsonl 'calibration.path={tmp_path}" in line
    assert not (tmp_path / "new" / "assets" / "demo" / "model").exists()
    assert (tmp_path / "new" / "assets" / "demo" / "evaluation.jsonl").is_file()  # what evaluation reads by default


@pytest.mark.parametrize("name", ["my text.jsonl", "mine ${x} [1].jsonl", "é, b.jsonl"])
def test_runs_by_hand_in_a_project_start_from_its_own_model_and_text(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / name).write_text('{"text": "a"}\n')
    create(tmp_path / "new", model=str(tmp_path / "model"), calibration=str(tmp_path / name))
    composed = compose_values(tmp_path / "new" / "conf", [])
    assert (composed["model"]["path"], composed["model"]["repo"]) == (f"{tmp_path}/model", None)
    assert (composed["calibration"]["name"], composed["calibration"]["path"]) == ("jsonl", f"{tmp_path}/{name}")
    create(tmp_path / "hub", model=f"owner/name@{'a1' * 20}")
    composed = compose_values(tmp_path / "hub" / "conf", [])
    assert (composed["model"]["repo"], composed["model"]["revision"]) == ("owner/name", "a1" * 20)


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path):
    create(tmp_path / "new", model=f"owner/name@{'a1' * 20}")
    assert shared_of(tmp_path / "new") == [
        "model=custom", "model.repo=owner/name", f"model.revision={'a1' * 20}", "calibration=auto",
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["owner/name", "owner/name@main", "no/such/folder", ""])
def test_a_model_that_is_neither_is_refused_and_nothing_is_made(tmp_path, model):
    with pytest.raises(UserError, match="give a folder, or owner/name@COMMIT"):
        create(tmp_path / "new", model=model)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("goal", list(goals()))
def test_the_variants_of_a_goal_are_lines_with_reasons_that_plan_takes(root, tmp_path, goal):
    create(tmp_path / "new", goal=goal)
    text = (tmp_path / "new" / "params.yaml").read_text(encoding="utf-8")
    variants = yaml.safe_load(text)["variants"]
    assert list(variants) == list(goals()[goal]["variants"])
    assert text.count("\n  # ") == len(variants)
    assert set(goals()[goal]["shared"]) < set(shared_of(tmp_path / "new"))
    capability, device = {"gpu24": (89, "cuda"), "gpu80": (90, "cuda")}.get(goal, (None, "cpu"))
    model = Model.open(root / "assets/demo/model", "demo")
    for name in variants:
        config = parse(
            compose_values(tmp_path / "new" / "conf", variant_overrides(tmp_path / "new" / "params.yaml", name))
        )
        machine = Machine(
            Target("vllm", "0.32.0", device, compute_capability=capability, **cpu_traits(device)), dict(config.backends),
            versions={"llamacpp": "2026.10.11549"},
        )  # fmt: skip
        plan = check(variant_spec(config.model_dump()), model, machine)
        assert plan.passes("quantize", "convert", "serve"), (name, plan.refused)


def test_each_variant_of_a_goal_has_the_size_that_plan_finds_for_the_model(tmp_path):
    create(tmp_path / "new", goal="edge")
    text = (tmp_path / "new" / "params.yaml").read_text(encoding="utf-8")
    reasons = re.findall(r"  # (.*)\n  (gguf-\S+): method=gguf method.type=", text)
    assert [name for _, name in reasons] == ["gguf-Q4_K_M", "gguf-Q5_K_M", "gguf-Q8_0", "gguf-IQ3_M"]
    assert (
        reasons[0][0]
        == "the usual choice, little more than half the size of Q8_0 in a large model; here 5.99 bits a weight, 7.10 MB"
    )
    assert all("bits a weight" in why for why, _ in reasons)


def test_a_variant_that_the_model_does_not_take_says_so(root, tmp_path):
    shutil.copytree(root / "assets/demo/model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.update(model_type="gemma2", architectures=["Gemma2ForCausalLM"])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    create(tmp_path / "new", model=str(tmp_path / "model"), goal="edge")
    assert "; plan refuses it: " in (tmp_path / "new" / "params.yaml").read_text()


def test_a_goal_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="goal=phone: there are gpu24, gpu80, cpu, edge"):
        create(tmp_path / "new", goal="phone")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_refused_and_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        create(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        create(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_calibration_text_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"no such file; give a \.jsonl, \.parquet or \.txt file"):
        create(tmp_path / "new", calibration="none.jsonl")


def test_within_a_repository_no_other_is_made(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    create(tmp_path / "new")
    assert not (tmp_path / "new" / ".git").exists()
