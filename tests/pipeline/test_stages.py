"""The table of stages, and dvc.yaml, which says the same to DVC."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from quantline.pipeline.code import code_files
from quantline.pipeline.compose import freeze
from quantline.pipeline.config import parse
from quantline.pipeline.stages import PIPELINE, STAGES, baseline_stages, before, names, of_config
from quantline.report.figures import BEST_FILE, FOLDER


@pytest.fixture(scope="module")
def pipeline(root):
    return yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def body(stage):
    return stage.get("do", stage)


def entries(pipeline):
    """(stage of the table, its entry in dvc.yaml), the baseline's entries too."""
    return [
        (name.removesuffix("_baseline"), body(entry))
        for name, entry in pipeline.items()
        if name.removesuffix("_baseline") in PIPELINE
    ]


def outputs_of(entry):
    return {dep for dep in entry.get("deps", []) if dep.startswith("artifacts/")}


def test_dvc_watches_the_code_of_a_stage_and_what_it_reads(pipeline):
    for name, entry in entries(pipeline):
        variant = "float" if entry["outs"][0].startswith(("artifacts/float", "artifacts/shared")) else "${key}"
        assert entry["params"] == [{"code.yaml": [name]}, {"inputs.yaml": [f"reads.{variant}.{name}"]}], name


def test_dvc_has_the_stages_of_the_table_in_its_order_and_the_baselines_beside_them(pipeline):
    each = [name for name in pipeline if name in PIPELINE]
    assert sorted(each) == sorted(PIPELINE)
    assert [name for name in each if name != "download"] == [name for name in PIPELINE if name != "download"]
    of_the_baseline = {name.removesuffix("_baseline") for name in pipeline if name.endswith("_baseline")} - {"compose"}
    assert of_the_baseline == set(names(lambda stage: bool(stage.beside_float)))
    assert of_the_baseline < set(baseline_stages())


def test_a_stage_depends_on_the_outputs_of_those_it_follows_and_on_the_baselines_where_it_compares(pipeline):
    for name, entry in entries(pipeline):
        stage, variant = STAGES[name], "float" if "float" in str(entry["outs"]) else "${key}"
        output = f"artifacts/{'shared' if stage.shared else variant}/{name}"
        assert entry["outs"] == [output, f"{output}.json"]
        found = outputs_of(entry)
        if variant == "${key}":
            for earlier in (*stage.after, *stage.takes):
                place = f"artifacts/{'shared' if STAGES[earlier].shared else variant}/{earlier}"
                assert (place in found) == (earlier not in stage.takes), (name, earlier)
            assert (f"artifacts/float/{name}" in found) == bool(stage.beside_float), name
        home = variant if variant == "${key}" else "float"
        files = {f"artifacts/{home}/{earlier}/{file}" for earlier, file in stage.takes.items()}
        of_float = {} if variant == "${key}" else {"calibrate"}
        assert {dep for dep in found if dep.count("/") > 2} == {
            file for file in files if file.split("/")[2] not in of_float
        }, name


def test_a_file_that_only_some_options_decide_is_one_that_a_later_stage_takes():
    taken = {(earlier, file) for stage in STAGES.values() for earlier, file in stage.takes.items()}
    assert {(stage.name, file) for stage in STAGES.values() for file in stage.decide} <= taken


def test_dvc_takes_its_metrics_from_the_figures_alone(pipeline):
    declared = {name: body(entry)["metrics"] for name, entry in pipeline.items() if "metrics" in body(entry)}
    assert declared == {"report": [BEST_FILE, FOLDER]}


def test_no_entry_names_a_source_file_but_compose(pipeline):
    for name, entry in pipeline.items():
        if not name.startswith(("compose", "code")):
            assert [dep for dep in body(entry).get("deps", []) if dep.startswith(("src", "stages", "assets"))] == [], (
                name
            )


def test_compose_is_made_again_after_an_edit_of_what_it_freezes(pipeline):
    for name in ("compose", "compose_baseline"):
        assert body(pipeline[name])["deps"] == ["conf", "envs"]
        assert {"code.yaml": ["compose"]} in body(pipeline[name])["params"]
    files = {name.removeprefix("src/quantline/") for name in code_files("compose")}
    parts = {"config/method.py", "pipeline/identity.py", "pipeline/agreement.py", "quantization/capabilities.yaml"}
    assert parts <= files
    assert not [name for name in files if name.startswith(("report/", "lifecycle/"))]


def test_the_nearest_stages_that_are_not_skipped_come_before(composed):
    gptq, rtn, baseline = (parse(composed(f"method={name}")) for name in ("gptq", "rtn", "float"))
    assert before(gptq, "quantize") == ("download", "calibrate")
    assert before(rtn, "quantize") == ("download",)
    assert before(gptq, "serve_smoke") == ("convert",)
    assert before(baseline, "serve_smoke") == ("download",)
    assert before(baseline, "evaluate") == ("serve_smoke",)
    assert (before(gptq, "noise"), before(gptq, "download")) == (("quantize",), ())


def test_the_baseline_is_not_quantized_and_every_variant_has_all_stages(composed):
    assert of_config(parse(composed("method=float"))) == ("download", "serve_smoke", "evaluate", "tasks", "speed")
    assert of_config(parse(composed("method=rtn"))) == PIPELINE


def test_every_stage_of_the_table_has_an_entrypoint(root):
    for name in STAGES:
        assert (root / "stages" / f"{name}.py").is_file(), name


def test_every_dependency_in_the_repository_exists(root, pipeline):
    for entry in pipeline.values():
        for dep in body(entry).get("deps", []):
            made = dep.split("/")[0] in ("artifacts", "variants", "fleet_smoke.json")
            assert made or (root / dep).exists(), dep


@pytest.fixture(scope="module")
def frozen(root, tmp_path_factory):
    """Frozen configurations of params.yaml's variants and of the baseline, made beside a checkout's conf/ and envs/."""
    folder = tmp_path_factory.mktemp("frozen")
    for name in ("conf", "envs", "params.yaml"):
        (folder / name).symlink_to(root / name)
    names = ["float", *yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))["variants"]]
    return {name: yaml.safe_load(freeze(folder, name).read_text(encoding="utf-8")) for name in names}


def test_what_a_stage_reads_is_in_every_frozen_configuration(frozen):
    for name in PIPELINE:
        stage = STAGES[name]
        for key in (*stage.reads, *(f"frozen.locks.{role}" for role in stage.locks)):
            for values in frozen.values():
                place = values
                for part in key.split("."):
                    assert part in place, f"{name}: {key}"
                    place = place[part]


def test_dvc_runs_all_stages_of_one_variant_before_those_of_the_next(root, tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    code = (
        "from dvc.repo import Repo\nfrom dvc.repo.reproduce import plan_repro\nRepo.init(no_scm=True)\n"
        "print('#', *(stage.addressing for stage in plan_repro(Repo().index.graph)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    once = {
        "code", "inputs", "compose_baseline", "download", "serve_smoke_baseline", "evaluate_baseline", "tasks_baseline",
        "fleet_smoke", "report",
    }  # fmt: skip
    each = ("compose", *names(lambda stage: not stage.shared))
    variants = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))["variants"]
    assert len(variants) >= 3
    planned = done.stdout.rpartition("#")[2].split()
    assert set(planned) == once | {f"{stage}@{name}" for stage in each for name in variants}
    assert planned[-2:] == ["fleet_smoke", "report"]
    per_variant = each[1:]
    turns = [stage for stage in planned if stage.partition("@")[0] in per_variant and "@" in stage]
    assert turns == [f"{stage}@{name}" for name in variants for stage in per_variant]


def test_each_stage_runs_the_command_of_its_name_from_its_frozen_configuration(pipeline):
    for entry, stage in pipeline.items():
        name = entry.removesuffix("_baseline")
        if name in ("code", "inputs"):
            assert stage["cmd"] == f"python -m stages.{name}"
            continue
        variant = "${key}" if "do" in stage else "float"
        expected = (
            f"python -m stages.compose variant={variant}"
            if name == "compose"
            else f"python -m stages.{name} -cp ../variants -cn {variant}"
        )
        assert body(stage)["cmd"] == expected
