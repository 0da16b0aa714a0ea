"""Files of a user's own are dependencies: a change reruns what reads them, and nothing else."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from checkout import copy_checkout

pytestmark = [pytest.mark.e2e, pytest.mark.toolchain("reference")]
TARGETS = ("calibrate@own", "calibrate@demo")


@pytest.fixture(scope="module")
def files(tmp_path_factory, root):
    """A model and texts outside of the checkout."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(root / "assets" / "demo" / "model", folder / "model")
    shutil.copyfile(root / "assets" / "demo" / "calibration.jsonl", folder / "own.jsonl")
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory, root, files):
    """A pipeline of two variants, one of them with its own text, run as far as the calibration."""
    copy = copy_checkout(root, tmp_path_factory.mktemp("own") / "copy")
    (copy.root / "params.yaml").write_text(
        f"shared: model=custom model.path={files / 'model'} calibration.n_samples=4 calibration.seq_len=64\n"
        "baseline: method=float\nvariants:\n"
        f"  own: method=gptq calibration=jsonl calibration.path={files / 'own.jsonl'}\n  demo: method=gptq\n"
    )
    assert set(ran(copy)) == {"code", "compose_baseline", "compose@own", "compose@demo", "inputs", "download", *TARGETS}
    return copy


def ran(copy):
    done = copy.dvc("repro", *TARGETS)
    assert done.code == 0, done.text
    return re.findall(r"Running stage '([^']+)'", done.text)


def append(path, row):
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def test_a_second_run_only_looks_at_the_files(copy):
    assert ran(copy) == ["inputs"]
    said = copy.dvc("status").out
    assert "inputs:\n\talways changed" in said
    assert not [line for line in said.splitlines() if line.startswith(("download", "calibrate", "compose", "code"))]


def test_a_changed_text_reruns_what_reads_it(copy, files):
    append(files / "own.jsonl", {"text": "one more"})
    assert ran(copy) == ["inputs", "calibrate@own"]
    assert ran(copy) == ["inputs"]


def test_a_file_that_is_only_written_again_reruns_nothing(copy, files):
    content = (files / "own.jsonl").read_bytes()
    (files / "own.jsonl").unlink()
    (files / "own.jsonl").write_bytes(content)
    assert ran(copy) == ["inputs"]


def test_a_file_beside_the_model_reruns_nothing_and_one_of_the_model_its_download(copy, files):
    (files / "model" / "README.md").write_text("read me")
    assert ran(copy) == ["inputs"]
    (files / "model" / "LICENSE").write_text("free to use")
    assert ran(copy)[:2] == ["inputs", "download"]


def test_results_stay_valid_where_the_files_are_not(copy, files):
    moved = files.with_name("elsewhere")
    files.rename(moved)
    try:
        assert ran(copy) == ["inputs"]
    finally:
        moved.rename(files)
    assert ran(copy) == ["inputs"]
