"""What a promotion takes from dvc.lock; the registry itself is in tracking/test_registry.py."""

from __future__ import annotations

import shlex
from contextlib import closing

import pytest
import report_records
import yaml
from dvc.repo import Repo

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.lifecycle import promotion
from quantline.lifecycle.promotion import with_whole_lock
from quantline.lifecycle.storage.dvc_lock import stage_keys
from quantline.lifecycle.storage.dvc_outputs import hashes_of
from quantline.lifecycle.tracking.registry import SERVING_TAG, Version, serving_line
from quantline.pipeline.paths import stage_paths
from quantline.pipeline.records import VariantRecord

CONFIG = {"frozen": {"variant": "one"}}


@pytest.fixture
def record(tmp_path):
    """A variant of the whole pipeline in DVC."""
    stages = {}
    for stage, key in stage_keys("one").items():
        paths = stage_paths(tmp_path / "artifacts", "one", stage)
        paths.output.mkdir(parents=True)
        (paths.output / "file").write_text(stage)
        write_json(paths.result, {"stage": stage})
        outs = [path.relative_to(tmp_path).as_posix() for path in (paths.output, paths.result)]
        body = {"cmd": "true", "outs": outs}
        stages[stage] = {"foreach": {"one": "x"}, "do": body} if "@" in key else body
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "params.yaml").write_text("variants: {one: x}\n")
    with closing(Repo.init(str(tmp_path), no_scm=True)) as repo:
        repo.commit(force=True)
    return VariantRecord("one", CONFIG, "", [], tmp_path)


def test_every_output_of_every_stage_is_registered(record):
    assert len(hashes_of(with_whole_lock(record).lock)) == 16


@pytest.mark.parametrize("harm", ["cut off", "missing", "made again without DVC"])
def test_a_variant_that_is_not_whole_in_dvc_lock_is_not_promoted(record, harm):
    lock = record.folder / "dvc.lock"
    if harm == "cut off":
        lock.write_text(lock.read_text().partition("  speed@one:")[0])
    elif harm == "missing":
        lock.unlink()
    else:
        write_json(record.folder / "artifacts" / "one" / "speed.json", {"stage": "other"})
    with pytest.raises(UserError, match=r"variant=one: dvc\.lock lacks .*speed@one as they are here.* run `dvc repro`"):
        with_whole_lock(record)


def test_a_version_says_how_it_is_served_and_one_of_before_that_says_nothing(tmp_path):
    made = next(one for one in report_records.records(tmp_path) if one.name == "gptq-w4-g128")
    results = {result["stage"]: result for result in made.results}
    results["convert"]["output_hash"] = "h"
    tags = promotion._tags(made, results, "f")
    assert f"\n    {tags[SERVING_TAG]}\n" in promotion._description(made, "m", "its lineage")
    line = serving_line(Version("m", "1", (), "run", tags), tmp_path / "my folder")
    assert shlex.split(line)[:4] == ["vllm", "serve", str(tmp_path / "my folder"), "--dtype"]
    assert shlex.split(line)[3:] == shlex.split(tags[SERVING_TAG])[3:]
    results["serve_smoke"].update(status="unsupported", reason="no kernel")
    tags = promotion._tags(made, results, "f")
    assert serving_line(Version("m", "1", (), "run", tags), tmp_path) is None
    said = promotion._description(made, "m", "its lineage")
    assert said == "Fetch it, verified:\n\n    python -m stages.fetch model=m alias=production out=DIR\n\nits lineage"


def test_a_manual_run_is_not_in_dvc(tmp_path):
    record = VariantRecord("by-hand/one", {}, "", [], tmp_path)
    assert with_whole_lock(record) is record
