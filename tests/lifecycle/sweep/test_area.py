"""The private work area of a job."""

from __future__ import annotations

import subprocess

import pytest

from quantline.lifecycle.sweep.area import copy_project, make_area, remove_area
from quantline.lifecycle.sweep.record import Sweep, new_home
from quantline.pipeline.dvc_config import cache_folder


@pytest.fixture
def project(tmp_path):
    """A project with outputs, a model of its own and DVC's settings."""
    root = tmp_path / "project"
    for name, text in {
        "conf/config.yaml": "a: 1\n", "dvc.yaml": "stages: {}\n", "dvc.lock": "schema: '2.0'\n",
        "params.yaml": "variants: {}\n",
        ".dvc/config": "[core]\n    analytics = false\n", ".dvc/tmp/lock": "", "models/own/config.json": "{}",
        "artifacts/a/convert/model.safetensors": "x", "scratch/.hashes.json": "{}", "scratch/big": "x", ".git/HEAD": "x",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_copy_has_the_code_and_links_own_files_and_leaves_outputs_out(project, tmp_path):
    copy_project(project, tmp_path / "copy")
    files = {
        path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert files == {"conf/config.yaml", "dvc.yaml", "dvc.lock", "params.yaml", ".dvc/config", "scratch/.hashes.json"}
    assert (tmp_path / "copy" / "models" / "own" / "config.json").read_text() == "{}"
    assert (tmp_path / "copy" / "models").is_symlink()


def test_an_area_shares_the_cache_and_dvc_takes_it_for_a_repository(project, tmp_path):
    home, cache = new_home(project), tmp_path / "cache"
    sweep = Sweep(home, project, ("a",), "local", 1, 0, None, cache)
    copy_project(project, sweep.project)
    area = make_area(sweep, "a")
    assert cache_folder(area) == cache
    asked = subprocess.run(["dvc", "root"], cwd=area, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "."
    (area / "left").write_text("by a killed job")
    assert not (make_area(sweep, "a") / "left").exists()
    # What an area links is not removed with it.
    remove_area(area)
    assert (project / "models" / "own" / "config.json").is_file()


def test_an_area_without_a_common_file_system_has_a_cache_of_its_own(project):
    home = new_home(project)
    sweep = Sweep(home, project, ("a",), "local", 1, 0, "store", project / ".dvc" / "cache")
    copy_project(project, sweep.project)
    assert cache_folder(make_area(sweep, "a")) == home / "areas" / "a" / ".dvc" / "cache"
