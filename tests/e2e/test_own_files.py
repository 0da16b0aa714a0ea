"""Files of a user's own are dependencies: a change reruns what reads them, and nothing else."""

from __future__ import annotations

import re
import shutil

import pytest
from checkout import copy_checkout

pytestmark = [pytest.mark.e2e, pytest.mark.toolchain("reference")]
TARGETS = ("quantize@own", "calibrate@demo")
FIRST = {
    "code", "compose_baseline", "compose@own", "compose@demo", "inputs", "download", "calibrate@own", "calibrate@demo",
    "quantize@own",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, root):
    """A model and texts outside of the checkout."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(root / "assets" / "demo" / "model", folder / "model")
    shutil.copyfile(root / "assets" / "demo" / "calibration.jsonl", folder / "own.jsonl")
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory, root, files):
    """A pipeline of two variants, one of them with its own text and quantized."""
    copy = copy_checkout(root, tmp_path_factory.mktemp("own") / "copy")
    (copy.root / "params.yaml").write_text(
        f"shared: model=custom model.path={files / 'model'} calibration.n_samples=4 calibration.seq_len=64 "
        "layer_errors.enabled=false\n"
        "baseline: method=float\nvariants:\n"
        f"  own: method=rtn calibration=jsonl calibration.path={files / 'own.jsonl'}\n"
        "  demo: method=gptq calibration=demo\n"
    )
    assert set(ran(copy)) == FIRST
    return copy


def ran(copy):
    done = copy.dvc("repro", *TARGETS)
    assert done.code == 0, done.text
    return re.findall(r"Running stage '([^']+)'", done.text)


def test_a_second_run_only_looks_at_the_files(copy):
    assert ran(copy) == ["inputs"]
    said = copy.dvc("status").out
    assert "inputs:\n\talways changed" in said
    assert not [line for line in said.splitlines() if line.startswith(("download", "calibrate", "compose", "code"))]


def test_a_text_that_gives_other_tokens_reruns_what_reads_them(copy, files):
    text = (files / "own.jsonl").read_text()
    (files / "own.jsonl").write_text(text.replace('"text": "', '"text": "Once more: '))
    assert ran(copy) == ["inputs", "calibrate@own", "quantize@own"]
    assert ran(copy) == ["inputs"]


def test_a_text_that_gives_the_same_tokens_reruns_the_calibration_alone(copy, files):
    place = copy.root / "artifacts" / "own" / "calibrate"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    text = (files / "own.jsonl").read_text()
    assert '"source": ' in text
    (files / "own.jsonl").write_text(text.replace('"source": ', '"origin": '))
    assert ran(copy) == ["inputs", "calibrate@own"]
    after = {path.name: path.read_bytes() for path in place.iterdir()}
    assert [name for name in sorted(before) if before[name] != after[name]] == ["manifest.json"]
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


def test_a_variant_that_cannot_be_quantized_stops_a_bare_repro_before_anything_is_computed(copy):
    params = copy.root / "params.yaml"
    before = params.read_text()
    params.write_text(f"{before}  narrow: method=awq group_size=256\n")
    try:
        done = copy.dvc("repro")
        assert done.code != 0
        assert "group_size=256: does not divide" in done.text
        assert set(re.findall(r"Running stage '([^']+)'", done.text)) <= {"code", "inputs", "compose@narrow"}
    finally:
        params.write_text(before)
