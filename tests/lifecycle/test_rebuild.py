"""A variant brought back from DVC's cache or a remote, and what is refused; making it again is in tests/e2e."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import closing

import numpy as np
import pytest
import yaml
from dvc.repo import Repo

from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.lifecycle.rebuild import _other_input, _stages, rebuild
from quantline.lifecycle.storage.dvc_outputs import hashes_of, variant_lock
from quantline.lifecycle.tracking.reader import TrackedRun
from quantline.lifecycle.worktree import make_worktree
from quantline.pipeline.code import CHECKOUT, code_files
from quantline.pipeline.hashing import hash_folder
from quantline.pipeline.identity import combined

PIPELINE = {
    "stages": {
        stage: {
            "foreach": {"one": "x"},
            "do": {
                "cmd": "true",
                "outs": [f"artifacts/${{key}}/{stage}"],
                "metrics": [f"artifacts/${{key}}/{stage}.json"],
            },
        }
        for stage in ("convert", "evaluate")
    }
}


def result_of(folder, stage):
    hashes = hash_folder(folder)
    return {
        "stage": stage, "status": "ok", "fingerprint": stage, "metrics": {"loss": 1.5}, "outputs": hashes.files,
        "tensors": hashes.tensors, "output_hash": combined(hashes.files), "inputs": {}, "environment": {"device": "cpu"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout with a variant in DVC's cache and in a remote, and the variant's run."""
    root = tmp_path_factory.mktemp("made") / "checkout"
    for stage in ("convert", "evaluate"):
        (root / "artifacts" / "one" / stage).mkdir(parents=True)
    weights = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.int32)}
    write_safetensors(root / "artifacts" / "one" / "convert" / "model.safetensors", weights)
    (root / "artifacts" / "one" / "evaluate" / "comparison.json").write_text("{}")
    results = {}
    for stage in ("convert", "evaluate"):
        results[stage] = result_of(root / "artifacts" / "one" / stage, stage)
        write_json(root / "artifacts" / "one" / f"{stage}.json", results[stage])
    (root / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    with closing(Repo.init(str(root), no_scm=True)):
        remote = root.parent / "remote"
        (root / ".dvc" / "config").write_text(
            f"[core]\n    no_scm = true\n    remote = near\n['remote \"near\"']\n    url = {remote}\n"
        )
    with closing(Repo(str(root))) as repo:
        repo.commit(force=True)
        assert repo.push() >= 6
    return root, TrackedRun("r1", "one", "e", {"method": {"name": "gptq"}}, results, variant_lock(root, "one"))


@pytest.fixture
def cloned(made, tmp_path):
    """A checkout that has no cache and no artifacts, only the configuration of the remote."""
    shutil.copytree(made[0] / ".dvc", tmp_path / "clone" / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    return tmp_path / "clone"


def test_the_lock_of_a_variant_names_its_outputs_by_dvcs_hashes(made):
    root, run = made
    assert sorted(run.lock) == ["convert@one", "evaluate@one"]
    assert len(hashes_of(run.lock)) == 4
    assert sum(name.endswith(".dir") for name in hashes_of(run.lock)) == 2
    result = root / "artifacts" / "one" / "convert.json"
    before = result.read_bytes()
    result.write_bytes(before + b"\n")  # made again since, but not by DVC
    assert sorted(variant_lock(root, "one")) == ["evaluate@one"]
    result.write_bytes(before)


@pytest.mark.parametrize("place", ["cache", "remote"])
def test_a_variant_comes_back_identical_from_the_cache_and_from_the_remote_alone(made, cloned, tmp_path, place):
    root, run = made
    done = rebuild(run, tmp_path / "out", root if place == "cache" else cloned, source="cache")
    assert done.difference is None
    assert done.compared == ["convert (1 files, 2 tensors)", "evaluate (1 metrics)"]
    assert hash_folder(tmp_path / "out" / "convert") == hash_folder(root / "artifacts" / "one" / "convert")
    assert json.loads((tmp_path / "out" / "evaluate.json").read_text()) == run.results["evaluate"]
    assert sorted(path.name for path in tmp_path.iterdir() if path != cloned) == ["out"]
    copied = tmp_path / "out" / "convert" / "model.safetensors"
    assert copied.stat().st_nlink == 1  # no link into the cache


def test_a_cached_output_that_differs_from_the_run_is_reported_and_removed(made, tmp_path):
    root, run = made
    recorded = json.loads(json.dumps(run.results))
    recorded["convert"]["tensors"]["b"] = "0"
    other = TrackedRun("r1", "one", "e", run.config, recorded, run.lock)
    done = rebuild(other, tmp_path / "out", root, source="cache")
    assert (done.difference.stage, done.difference.kind, done.difference.key) == ("convert", "tensor", "b")
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_neither_cache_nor_remote_has_is_an_error_that_names_the_hashes(made, tmp_path):
    root, run = made
    lock = json.loads(json.dumps(run.lock).replace(run.lock["convert@one"]["outs"][0]["md5"], "0" * 32 + ".dir"))
    other = TrackedRun("r1", "one", "e", run.config, run.results, lock)
    with pytest.raises(UserError, match=rf"neither the cache nor a remote has convert \({'0' * 32}\.dir\)"):
        rebuild(other, tmp_path / "out", root, source="cache")
    by_hand = TrackedRun("r1", "one", "e", run.config, run.results)
    with pytest.raises(UserError, match="has no outputs in DVC of convert, evaluate: it was run manually"):
        rebuild(by_hand, tmp_path / "out", root, source="cache")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_published_with_a_part_of_dvc_lock_does_not_come_back_in_part(made, tmp_path):
    root, run = made
    part = TrackedRun("r1", "one", "e", run.config, run.results, {"convert@one": run.lock["convert@one"]})
    with pytest.raises(UserError, match=r"has no outputs in DVC of evaluate: .*give from=source to rebuild it"):
        rebuild(part, tmp_path / "out", root, source="cache")
    assert list(tmp_path.iterdir()) == []


def test_without_dvc_the_sources_are_advised(made, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"is not a DVC repository .*; give from=source to rebuild it"):
        rebuild(made[1], tmp_path / "out", tmp_path / "bare", source="cache")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize("source", ["cache", "source", "auto"])
def test_what_was_made_on_a_gpu_and_is_in_no_cache_is_not_advised_to_and_fro(made, tmp_path, monkeypatch, source):
    root, run = made
    monkeypatch.setattr("quantline.lifecycle.rebuild.detect_platform", lambda: "cpu")
    results = {stage: {**result, "environment": {"device": "cuda"}} for stage, result in run.results.items()}
    lost = TrackedRun("r1", "one", "e", run.config, results)  # nothing of it is in DVC
    with pytest.raises(UserError) as told:
        rebuild(lost, tmp_path / "out", root, source=source)
    expected = {
        "cache": "give from=source on a machine with a GPU to rebuild it",
        "source": "and this machine has none: other devices give other weights; give from=cache",
        "auto": "and this machine has none: other devices give other weights; rebuild it on a machine with one",
    }
    assert str(told.value).endswith(expected[source])


def test_a_remote_that_dvc_does_not_know_is_refused_though_the_cache_has_all(made, tmp_path):
    root, run = made
    with pytest.raises(UserError, match="remote=nope: DVC has no such remote; there are near"):
        rebuild(run, tmp_path / "out", root, source="auto", remote="nope")
    assert list(tmp_path.iterdir()) == []


def test_a_remote_that_cannot_be_read_is_named(cloned, made, tmp_path):
    (cloned / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    remote = far\n['remote \"far\"']\n    url = ssh://127.0.0.1:1/nowhere\n"
    )
    with pytest.raises(
        UserError, match=r"the remote far could not be read \(.*; `dvc remote list` .*the cache does not have"
    ):
        rebuild(made[1], tmp_path / "out", cloned, source="cache")


def test_a_commit_with_a_link_that_leads_out_is_unpacked_without_it(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "own.txt").write_text("own")
    (root / "data").symlink_to("/somewhere/else")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *command], cwd=root, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True).stdout
    area = make_worktree(tmp_path / "area", root, commit=commit.strip(), patch=None, code={})
    assert sorted(path.name for path in area.root.iterdir()) == [".venvs", "own.txt"]


def test_an_existing_out_folder_is_refused(made, tmp_path):
    root, run = made
    with pytest.raises(UserError, match="already exists"):
        rebuild(run, tmp_path, root, source="cache")


def test_code_that_is_not_what_made_it_is_refused_and_the_file_is_named(tmp_path):
    here = code_files("convert", CHECKOUT)
    assert len(here) > 20
    area = make_worktree(tmp_path / "area", CHECKOUT, commit=None, patch=None, code={"convert": here})
    assert area.origin == "the checkout"
    assert code_files("convert", tmp_path / "area") == here
    name = "src/quantline/conversion/convert.py"
    with pytest.raises(
        UserError,
        match=rf"0{{40}}: this repository does not have it; fetch it \(git fetch\)\n  the checkout: {name}, .* differs",
    ):
        make_worktree(tmp_path / "other", CHECKOUT, commit="0" * 40, patch=None, code={"convert": {**here, name: "0"}})
    assert not (tmp_path / "other").exists()


def test_inputs_of_a_manual_run_from_other_runs_are_rebuilt_and_compared_by_hash():
    results = {"calibrate": {"inputs": {"download": "d"}}, "convert": {"inputs": {"quantize": "q"}}}
    run = TrackedRun("r1", "by-hand/one", "e", {"method": {"name": "gptq"}}, results)
    assert _stages(run, "evaluate") == ["download", "calibrate", "quantize", "convert"]
    assert _stages(run, "calibrate") == ["download", "calibrate"]
    assert _other_input(run, "download", {"output_hash": "d"}) is None
    assert str(_other_input(run, "quantize", {"output_hash": "x"})) == "quantize, output hash: q | x"
    made = {"output_hash": "x", "outputs": {"tokens.safetensors": "t"}}
    results["quantize"] = {"inputs": {"calibrate/tokens.safetensors": "t"}}
    assert _other_input(run, "calibrate", made) is None
    results["quantize"] = {"inputs": {"calibrate/tokens.safetensors": "u"}}
    assert str(_other_input(run, "calibrate", made)) == "calibrate, output tokens.safetensors: u | t"
    baseline = TrackedRun("r1", "float", "e", {"method": {"name": "float"}}, {"evaluate": {"inputs": {}}})
    assert _stages(baseline, "evaluate") == ["download", "serve_smoke", "evaluate"]
