"""The pipeline on a second machine: pulled from a remote, restored from a backup; and no secret in what it wrote."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from checkout import PLANTED, SHARED, VARIANTS, Checkout

# Whichever of these tests comes first builds the pipeline, and the environments where they are not there.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


def second_machine(pipeline, folder: Path) -> Checkout:
    """A clone with a cache of its own, as git has the first one."""
    folder.mkdir(parents=True)
    pipeline.git("clone", "-q", str(pipeline.root), str(folder / "checkout"))
    clone = Checkout(folder / "checkout")
    (clone.root / ".venvs").mkdir()
    for environment in (pipeline.root / ".venvs").iterdir():
        (clone.root / ".venvs" / environment.name).symlink_to(environment.resolve())
    return clone


def outputs(copy: Checkout) -> dict[str, bytes]:
    """The files that DVC keeps of the variants of the first run; other tests may have added variants."""
    folder = copy.root / "artifacts"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("shared", "float", *VARIANTS)
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }


def assert_same_and_nothing_to_do(clone: Checkout, pipeline: Checkout) -> None:
    assert outputs(clone) == outputs(pipeline)
    done = clone.dvc("repro")
    assert done.code == 0, done.text
    assert re.findall(r"Running stage '([^']+)'", done.text) == ["inputs"]


def test_a_second_clone_pulls_and_dvc_repro_has_nothing_to_do(pipeline, tmp_path):
    config = pipeline.root / ".dvc" / "config"
    before = config.read_bytes()
    try:
        assert pipeline.dvc("remote", "add", "--default", "storage", str(tmp_path / "remote")).code == 0
        pushed = pipeline.dvc("push", "--run-cache")
        assert pushed.code == 0, pushed.text
        clone = second_machine(pipeline, tmp_path / "second")
        shutil.copyfile(config, clone.root / ".dvc" / "config")
        pulled = clone.dvc("pull", "--run-cache")
        assert pulled.code == 0, pulled.text
        assert_same_and_nothing_to_do(clone, pipeline)
    finally:
        config.write_bytes(before)


def test_a_backup_is_restored_into_an_empty_clone_with_mlflows_store(pipeline, tmp_path):
    # Other tests had other variants, whose leftovers here are an input of `report` and in no backup.
    tidied = pipeline.run("python", "-m", "stages.retention", "apply=true")
    assert tidied.code == 0, tidied.text
    assert pipeline.dvc("repro").code == 0
    published = pipeline.run("python", "-m", "stages.publish")
    assert published.code == 0, published.text
    saved = pipeline.run("python", "-m", "stages.backup", f"to={tmp_path}/backup")
    assert saved.code == 0, saved.text
    clone = second_machine(pipeline, tmp_path / "second")
    done = clone.run("python", "-m", "stages.restore", f"from={tmp_path}/backup")
    assert done.code == 0, done.text
    assert "all match dvc.lock" in done.out
    assert_same_and_nothing_to_do(clone, pipeline)
    again = clone.run("python", "-m", "stages.publish")
    assert again.code == 0, again.text
    assert "unchanged" in again.err
    assert "new" not in again.err.splitlines()[0]
    occupied = pipeline.run("python", "-m", "stages.restore", f"from={tmp_path}/backup")
    assert occupied.code == 2
    assert "a backup is restored into a fresh clone" in occupied.err


def test_no_secret_is_in_anything_that_was_written(pipeline, first_run):
    """The pipeline ran with them in its environment; here a stage by hand and a publish do."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://ann:{PLANTED['MLFLOW_TRACKING_PASSWORD']}@127.0.0.1:{closed.getsockname()[1]}"
        by_hand = ["python", "-m", "stages.calibrate", *SHARED, "method=rtn", "variant=secretive"]
        down = pipeline.run(*by_hand, **{**PLANTED, "MLFLOW_TRACKING_URI": address})
    assert down.code == 0, down.text
    assert "NOT PUBLISHED" in down.err
    assert "***" in down.err
    refused = pipeline.run(*by_hand, f"tracking.uri={address}", **PLANTED)
    assert refused.code == 2
    assert "contains a password" in refused.err
    published = pipeline.run("python", "-m", "stages.publish", **PLANTED)
    assert published.code == 0, published.text
    try:
        files = []
        for folder, folders, names in os.walk(pipeline.root.parent):
            # The tests themselves hold what is planted.
            folders[:] = [name for name in folders if name not in (".git", ".venvs", "tests")]
            files += [Path(folder, name) for name in names]
        said = {file: file.read_bytes() for file in files if file.is_file()}
        written = {path.relative_to(pipeline.root).parts[0] for path in said if path.is_relative_to(pipeline.root)}
        assert {"artifacts", "scratch", "variants", ".dvc", "mlflow.db", "mlartifacts"} <= written
        assert any(path.name == "serve_smoke.log" for path in said)
        texts = {str(path): text for path, text in said.items()}
        for name, done in (("first run", first_run), ("by hand", down), ("refused", refused), ("publish", published)):
            texts[name] = done.text.encode()
        found = [
            (name, key) for name, text in texts.items() for key, secret in PLANTED.items() if secret.encode() in text
        ]
        assert found == []
    finally:
        shutil.rmtree(pipeline.root / "scratch", ignore_errors=True)
