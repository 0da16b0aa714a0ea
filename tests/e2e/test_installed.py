"""The wheel: built, installed into a folder of its own, and used in a project that is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def installed(root, tmp_path_factory):
    """The folder of packages."""
    folder = tmp_path_factory.mktemp("installed")
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "build", "-q", "--wheel", "-o", str(folder / "dist"), str(root)], check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "packages"
    subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Run a command of the installed package in a folder."""
    home = tmp_path_factory.mktemp("projects")

    def go(folder: str, *command: str):
        (home / folder).mkdir(exist_ok=True)
        variables = {
            **os.environ, "PYTHONPATH": str(installed), "DVC_NO_ANALYTICS": "1",
            "PATH": f"{installed / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            command, cwd=home / folder, env=variables, capture_output=True, text=True, check=False, timeout=600
        )
        return done.returncode, done.stdout + done.stderr, home / folder

    return go


@pytest.fixture(scope="module")
def project(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("made") / "project"
    code, said, _ = run(".", "quantline", "init", f"to={place}")
    assert code == 0, said
    return place


def test_a_command_outside_a_project_says_how_to_make_one(run):
    code, said, _ = run("elsewhere", "quantline", "plan")
    assert code == 2
    assert "quantline init to=DIR" in said
    assert "Traceback" not in said


def test_the_same_code_has_the_same_identity_as_in_a_checkout(run, project, root, tmp_path):
    shutil.copytree(project, tmp_path / "project")
    code, said, _ = run(str(tmp_path / "project"), "quantline", "code")
    assert code == 0, said
    here = subprocess.run(
        [sys.executable, "-c", "from quantline.pipeline.code import stage_hash; print(stage_hash('quantize'))"],
        env={**os.environ, "PYTHONPATH": str(root / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    written = yaml.safe_load((tmp_path / "project" / "code.yaml").read_text(encoding="utf-8"))
    assert written["quantize"] == here.stdout.strip()


def test_dvc_freezes_the_variants_of_a_project_and_plan_reads_its_configuration(run, project):
    assert run(str(project), "quantline", "check")[0] == 0
    code, said, _ = run(str(project), sys.executable, "-m", "dvc", "repro", "compose")
    assert code == 0, said
    assert (project / "variants" / "gptq-w4-g128.yaml").is_file()
    code, said, _ = run(str(project / "conf"), "quantline", "plan", "method=gptq")
    assert code == 0, said
    assert "ok: no known reason against it" in said
    code, said, _ = run(str(project), "quantline", "calibrate", "-cp", "../variants", "-cn", "gptq-w4-g128")
    assert "run: python -m stages.download" in said or "dvc repro" in said, said


def test_workers_see_the_package_alone(run, installed):
    code = (
        "import os; from quantline.toolchains.toolchain import worker_environment as variables; "
        "print(os.listdir(variables(1)['PYTHONPATH']))"
    )
    assert run(".", sys.executable, "-c", code)[1].strip() == "['quantline']"
