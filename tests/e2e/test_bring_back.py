"""A variant brought back from its MLflow run alone, in a clone that has nothing of the pipeline's but its code."""

from __future__ import annotations

import json
import sqlite3

import pytest
from checkout import Checkout

from quantline.pipeline.identity import file_hashes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

NAME = "gptq-w4-g128"


@pytest.fixture(scope="module")
def run_id(pipeline):
    """The variant's run, published, and what DVC keeps of it pushed to a remote."""
    done = pipeline.run("python", "-m", "stages.publish")
    assert done.code == 0, done.text
    assert pipeline.dvc("remote", "add", "--local", "-f", "near", str(pipeline.root.parent / "remote")).code == 0
    stages = [f"{stage}@{NAME}" for stage in ("calibrate", "convert", "serve_smoke", "evaluate")]
    done = pipeline.dvc("push", "-r", "near", *stages)
    assert done.code == 0, done.text
    with sqlite3.connect(pipeline.root / "mlflow.db") as store:
        query = (
            "select runs.run_uuid from runs join tags on tags.run_uuid = runs.run_uuid "
            "where name = ? and tags.key = 'quantline.current' and tags.value = 'true'"
        )
        ((found,),) = store.execute(query, [NAME])
    return found


@pytest.fixture(scope="module")
def clone(pipeline, run_id):
    """A fresh clone beside it: neither cache nor artifacts nor a tracking store."""
    target = pipeline.root.parent / "clone"
    pipeline.git("clone", "-q", str(pipeline.root), str(target))
    (target / ".venvs").symlink_to(pipeline.root / ".venvs")
    copy = Checkout(target)
    assert copy.dvc("remote", "add", "--local", "near", str(pipeline.root.parent / "remote")).code == 0
    return copy


def rebuilt(clone, pipeline, *options):
    uri = f"tracking.uri=sqlite:///{pipeline.root / 'mlflow.db'}"
    return clone.run("python", "-m", "stages.rebuild", f"out={clone.root / 'back'}", uri, *options)


def removed(clone):
    """What came back, by file; and it is gone again, with nothing else left."""
    files = file_hashes(clone.root / "back" / "convert")
    clone.run("rm", "-r", str(clone.root / "back"))
    assert clone.leftovers() == []
    assert [path.name for path in clone.root.iterdir() if "partial" in path.name] == []
    return files


def test_a_clone_that_has_only_the_remote_gets_an_identical_variant(pipeline, clone, run_id):
    done = rebuilt(clone, pipeline, f"run={run_id[:12]}", "from=cache", "remote=near")
    assert done.code == 0, done.text
    assert "IDENTICAL, from DVC's cache" in done.out
    assert "evaluate (" in done.out
    assert removed(clone) == pipeline.result(NAME, "convert")["outputs"]


def test_a_clone_without_cache_and_remote_makes_an_identical_variant_from_its_sources(pipeline, clone, run_id):
    """Up to the checkpoint: making the float baseline and both evaluations again takes minutes more."""
    fingerprint = pipeline.result(NAME, "convert")["fingerprint"]
    done = rebuilt(clone, pipeline, f"run={fingerprint[:20]}", "from=source", "until=convert")
    assert done.code == 0, done.text
    assert "IDENTICAL, from commit " in done.out
    for stage in ("download", "calibrate", "quantize", "convert"):
        made = pipeline.result("shared" if stage == "download" else NAME, stage)
        assert f"{stage} ({len(made['outputs'])} files, " in done.out
    assert removed(clone) == pipeline.result(NAME, "convert")["outputs"]


def test_the_chain_of_a_variant_is_told_from_weights_to_verdict_and_what_differs_from_another(pipeline, run_id):
    done = pipeline.run("python", "-m", "stages.lineage", f"variant={NAME}", "lineage.format=json")
    assert done.code == 0, done.text
    chain = json.loads(done.out)
    assert chain["faults"] == []
    assert [link["stage"] for link in chain["stages"]][:6] == [
        "download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate"
    ]  # fmt: skip
    assert all(link["tensors"] for link in chain["stages"][:4])
    same = pipeline.run("python", "-m", "stages.lineage", f"variant={NAME}", f"against={run_id}")
    assert "no difference in download, calibrate, quantize" in same.out
    other = pipeline.run("python", "-m", "stages.lineage", f"variant={NAME}", "against=gptq-w8-g128")
    assert "first difference: quantize, identity options.bits: 4 | 8" in other.out
