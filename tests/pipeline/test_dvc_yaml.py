"""dvc.yaml names, for each stage, every module that has a part in what the stage makes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
import yaml

from quantline.config.evaluate import WINDOW_KEYS
from quantline.pipeline.compose import freeze

# What is around a stage's work: it decides where and whether something is made, not what. A change of it reruns nothing.
PLUMBING = {
    "__init__", "collect", "compose", "config", "entry", "errors", "folders", "jobs", "lineage", "ports", "progress",
    "publishing", "results", "stage", "supervisor", "toolchains", "tracking", "variants",
}  # fmt: skip
# What results are told apart by: after a change of it `publish` would take none for current.
IDENTITY = "src/quantline/pipeline/identity.py"
# Imports for the names of files alone, and a tag of MLflow that reads like a module.
FOR_CONSTANTS = {("tokenizing", "download"), ("tracking_plan", "served")}
# What a stage starts by a name that it puts together.
WORKERS = {"quantize": ["backends"]}
STAGES = ("download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks")


@pytest.fixture(scope="module")
def pipeline(root):
    return yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def body(stage):
    return stage.get("do", stage)


def imported(path, source):
    """Modules of quantline that a file imports, or starts by name, when it runs, dotted, without the first part."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"quantline(\.[a-z_]+)+", str(node.value)):
            names = [str(node.value)]  # a worker, started by its name
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import is not followed"
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "quantline" and len(parts) > 1 and file_of(source, ".".join(parts[1:])):
                yield ".".join(parts[1:])


def file_of(source, module):
    path = source / module.replace(".", "/")
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def closure(root, stage):
    """Every module, plumbing aside, that a stage or a worker of it imports, directly or by another one."""
    source = root / "src" / "quantline"
    ahead = list(imported(root / "stages" / f"{stage}.py", source))
    for worker in WORKERS.get(stage, []):
        folder = source / worker
        ahead += [f"{worker}.{path.stem}" for path in folder.glob("*.py")] if folder.is_dir() else [worker]
    found = set()
    while ahead:
        module = ahead.pop()
        if module not in found and module.split(".")[0] not in PLUMBING:
            found.add(module)
            below = imported(file_of(source, module.removesuffix(".__init__")), source)
            ahead += [inner for inner in below if (module, inner) not in FOR_CONSTANTS]
    return found


def files_of(root, stage):
    """The stage's own file, its modules, and the data beside them."""
    source = root / "src" / "quantline"
    files = {root / "stages" / f"{stage}.py"}
    for module in closure(root, stage):
        path = file_of(source, module.removesuffix(".__init__"))
        files |= {path, *path.parent.glob(f"{path.stem}.yaml")}
    return {path.relative_to(root) for path in files}


def uncovered(root, stage, deps):
    return sorted(
        path.as_posix()
        for path in files_of(root, stage)
        if path.as_posix() not in deps and not any(parent.as_posix() in deps for parent in path.parents)
    )


STAGE_ENTRIES = [
    ("download", "download"), ("calibrate", "calibrate"), ("quantize", "quantize"), ("convert", "convert"),
    ("serve_smoke", "serve_smoke"), ("serve_smoke_baseline", "serve_smoke"), ("evaluate", "evaluate"),
    ("evaluate_baseline", "evaluate"), ("tasks", "tasks"), ("tasks_baseline", "tasks"), ("speed", "speed"),
    ("report", "report"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "stage"), STAGE_ENTRIES)
def test_a_stage_depends_on_every_module_that_its_work_imports(root, pipeline, entry, stage):
    assert uncovered(root, stage, body(pipeline[entry])["deps"]) == []


def test_the_walk_over_imports_reaches_modules_at_any_distance(root):
    assert {"reference", "probe"} <= closure(root, "download")
    assert {"quantization", "backends.autoawq", "model_config", "formats.packing"} <= closure(root, "quantize")
    assert {"served", "server_log", "windows", "tokenizing"} <= closure(root, "serve_smoke")
    assert {path.name for path in files_of(root, "serve_smoke")} >= {"serving_rules.yaml", "serve_smoke.py"}
    assert "serving" not in closure(root, "evaluate")


@pytest.mark.parametrize(("entry", "stage"), STAGE_ENTRIES)
def test_a_stage_depends_on_no_module_that_its_work_does_not_import(root, pipeline, entry, stage):
    used = {path.as_posix() for path in files_of(root, stage)}
    for dep in body(pipeline[entry])["deps"]:
        if dep.startswith(("src/", "stages/")) and dep != IDENTITY:
            assert dep in used or any(path.startswith(f"{dep}/") for path in used), dep


def test_every_stage_depends_on_what_results_are_told_apart_by(pipeline):
    assert [entry for entry, stage in pipeline.items() if IDENTITY not in body(stage)["deps"]] == []


def test_every_dependency_in_the_repository_exists(root, pipeline):
    for stage in pipeline.values():
        for dep in body(stage)["deps"]:
            made = dep.split("/")[0] in ("artifacts", "variants")
            assert made or (root / dep).exists(), dep


def test_every_baseline_entry_depends_on_the_same_modules_as_the_variants(pipeline):
    for name in ("serve_smoke", "evaluate", "tasks"):
        one, other = (
            {dep for dep in body(pipeline[entry])["deps"] if dep.startswith(("src/", "stages/"))}
            for entry in (name, f"{name}_baseline")
        )
        assert one == other, name


@pytest.fixture(scope="module")
def frozen(root, tmp_path_factory):
    """Frozen configurations of params.yaml's variants and of the baseline, made beside a checkout's conf/ and envs/."""
    folder = tmp_path_factory.mktemp("frozen")
    for name in ("conf", "envs", "params.yaml"):
        (folder / name).symlink_to(root / name)
    names = ["float", *yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))["variants"]]
    return {name: yaml.safe_load(freeze(folder, name).read_text(encoding="utf-8")) for name in names}


def test_every_parameter_of_a_stage_is_in_every_frozen_configuration(pipeline, frozen):
    referenced = 0
    for entry, stage in pipeline.items():
        for group in body(stage)["params"]:
            if not isinstance(group, dict):
                continue
            ((file, keys),) = group.items()
            name = re.fullmatch(r"variants/(.+)\.yaml", file)[1]
            for values in frozen.values() if name == "${key}" else [frozen[name]]:
                for key in keys:
                    referenced += 1
                    place = values
                    for part in key.split("."):
                        assert part in place, f"{entry}: {key}"
                        place = place[part]
    assert referenced > 50


def test_what_a_fingerprint_covers_is_what_dvc_watches(pipeline):
    """An option that changes a fingerprint without a rerun would leave results that `publish` leaves out."""
    watched = {entry: {key for group in body(stage)["params"] if isinstance(group, dict) for keys in group.values()
                       for key in keys} for entry, stage in pipeline.items()}  # fmt: skip
    assert watched["quantize"] >= {"method", "bits", "group_size", "seed", "threads", "frozen.locks.quantizer"}
    assert watched["calibrate"] >= {"calibration"}
    for entry in ("serve_smoke", "serve_smoke_baseline"):
        assert watched[entry] >= {"frozen.locks.server"}
        # Of the evaluation only what decides which tokens are scored: another limit or instrument serves nothing again.
        assert {key for key in watched[entry] if key.startswith("evaluate")} == {
            f"evaluate.{key}" for key in WINDOW_KEYS
        }
        assert {key for key in watched[entry] if key.startswith("serve.")} == {
            "serve.runtime", "serve.max_model_len", "serve.dtype", "serve.enforce_eager", "serve.smoke"
        }  # fmt: skip
    for entry in ("evaluate", "evaluate_baseline"):
        assert watched[entry] >= {"evaluate", "frozen.locks.reference"}
    for entry in ("tasks", "tasks_baseline"):
        assert watched[entry] >= {"tasks", "serve.max_model_len", "serve.dtype", "serve.enforce_eager", "serve.runtime"}
        assert watched[entry] >= {"frozen.locks.tasks", "frozen.locks.server"}


def test_the_serving_options_that_dvc_watches_are_all_but_those_of_the_process(frozen, pipeline):
    group = body(pipeline["serve_smoke"])["params"][0]["variants/${key}.yaml"]
    watched = {key.removeprefix("serve.") for key in group if key.startswith("serve.")}
    assert watched == set(frozen["float"]["serve"]) - {"process"}


def test_dvc_resolves_the_pipeline_to_the_stages_of_each_variant(root, tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    code = "from dvc.repo import Repo\nRepo.init(no_scm=True)\nprint('#', *(s.addressing for s in Repo().index.stages))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    once = {
        "compose_baseline", "download", "serve_smoke_baseline", "evaluate_baseline", "tasks_baseline", "report"
    }  # fmt: skip
    each = ("compose", "calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks", "speed")
    variants = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))["variants"]
    assert len(variants) >= 3
    assert set(done.stdout.rpartition("#")[2].split()) == once | {
        f"{stage}@{name}" for stage in each for name in variants
    }


def test_each_stage_runs_the_command_of_its_name_from_its_frozen_configuration(pipeline):
    for entry, stage in pipeline.items():
        name = entry.removesuffix("_baseline")
        variant = "${key}" if "do" in stage else "float"
        expected = (
            f"python -m stages.compose variant={variant}"
            if name == "compose"
            else f"python -m stages.{name} -cp ../variants -cn {variant}"
        )
        assert body(stage)["cmd"] == expected
