from __future__ import annotations

import shutil
import socket

import pytest

from quantline.core.errors import QuantlineError, UserError
from quantline.lifecycle.retention import collect_garbage, former_outputs, remove_former, remove_partial
from quantline.lifecycle.storage.dvc_cache import all_objects, object_path, objects_of
from quantline.lifecycle.storage.dvc_lock import read_lock
from quantline.lifecycle.verify import verify
from stages import retention as retention_stage
from stages import verify as verify_stage


@pytest.fixture
def changed(project):
    """`one` was changed since and `two` was dropped: what their first runs made is needed by no variant."""
    before = {output.path: output.md5 for output in read_lock(project.root)}
    project.variants(one="c")
    project.dvc("repro", "-q", "quantize@one")
    lock = project.root / "dvc.lock"
    lock.write_text(lock.read_text()[: lock.read_text().index("  quantize@two:")])
    return project, before


def test_a_dry_run_lists_objects_and_removes_nothing(changed):
    project, before = changed
    there = set(all_objects(project.cache))
    garbage = collect_garbage(project.root, {})
    needed = objects_of(project.cache, [output.md5 for output in read_lock(project.root)])
    assert set(garbage.objects) == there - needed
    assert before["artifacts/two/quantize"] in garbage.objects
    assert garbage.bytes > 2000
    assert set(garbage.described) == set(garbage.objects)
    assert garbage.described[before["artifacts/two/quantize"]].startswith("the list of a folder: ")
    assert set(all_objects(project.cache)) == there


def test_what_a_promoted_variant_needs_is_never_removed(changed):
    project, before = changed
    kept = dict.fromkeys([before["artifacts/two/quantize"], before["artifacts/two/quantize.json"]], "demote it")
    whole = objects_of(project.cache, kept)
    assert len(whole) == 4
    garbage = collect_garbage(project.root, kept, apply=True)
    assert garbage.protected == 4
    assert garbage.objects
    assert not whole.intersection(garbage.objects)
    there = set(all_objects(project.cache))
    assert there == whole | objects_of(project.cache, [output.md5 for output in read_lock(project.root)])
    assert collect_garbage(project.root, kept, apply=True).objects == ()


def test_a_protected_folder_whose_list_is_gone_stops_everything(changed):
    project, _ = changed
    there = set(all_objects(project.cache))
    with pytest.raises(UserError, match="a promoted variant needs it"):
        collect_garbage(project.root, {"0" * 32 + ".dir": "demote it"}, apply=True)
    with pytest.raises(UserError, match="is not a DVC MD5"):
        collect_garbage(project.root, {"../x": "demote it"}, apply=True)
    assert set(all_objects(project.cache)) == there


def test_a_dvc_lock_that_was_cut_off_and_a_workspace_whose_files_are_unknown_stop_everything(project):
    there, path = set(all_objects(project.cache)), project.root / "dvc.lock"
    whole = path.read_text()
    path.write_text(whole.partition("  quantize@two:")[0])
    with pytest.raises(UserError, match=r"dvc\.lock does not have quantize@two, .* run `dvc repro`"):
        collect_garbage(project.root, {}, apply=True)
    path.write_text(whole)
    (folder,) = [output for output in read_lock(project.root) if output.path == "artifacts/one/quantize"]
    lost = object_path(project.cache, folder.md5)
    text = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match=r"is missing or damaged; it lists the files of artifacts/one/quantize"):
        collect_garbage(project.root, {}, apply=True)
    lost.write_bytes(text)
    assert set(all_objects(project.cache)) == there


def test_a_file_of_a_promoted_variant_that_is_lost_stops_everything(changed):
    project, before = changed
    kept = {before["artifacts/two/quantize"]: "demote it"}
    lost = object_path(project.cache, min(objects_of(project.cache, kept) - kept.keys()))
    lost.unlink()
    there = set(all_objects(project.cache))
    with pytest.raises(UserError, match=f"{lost}: is missing or damaged, and a promoted variant needs it"):
        collect_garbage(project.root, kept, apply=True)
    assert set(all_objects(project.cache)) == there


def test_commits_may_be_kept_too(changed):
    project, _ = changed
    assert collect_garbage(project.root, {}, keep="commits").objects == ()
    with pytest.raises(UserError, match="keep=all: allowed are workspace, branches, tags, commits"):
        collect_garbage(project.root, {}, keep="all")


def test_what_a_branch_or_a_tag_needs_is_kept_on_request(changed):
    project, before = changed
    whole = objects_of(project.cache, {before["artifacts/two/quantize"]})
    project.git("branch", "former")  # as it was committed
    project.git("commit", "-qam", "changed")
    assert whole & set(collect_garbage(project.root, {}).objects)
    assert not whole & set(collect_garbage(project.root, {}, keep="branches").objects)
    project.git("tag", "release", "former")
    project.git("branch", "-qD", "former")
    assert whole & set(collect_garbage(project.root, {}, keep="branches").objects)
    assert not whole & set(collect_garbage(project.root, {}, keep="tags").objects)


def test_a_remote_is_cleaned_along_with_the_cache(changed, tmp_path):
    project, before = changed
    project.dvc("remote", "add", "store", str(tmp_path / "store"))
    shutil.copytree(project.cache / "files", tmp_path / "store" / "files")  # as if all had been pushed
    there = set(all_objects(tmp_path / "store"))
    kept = {before["artifacts/two/quantize"]: "demote it"}
    needed = objects_of(project.cache, {*kept, *(output.md5 for output in read_lock(project.root))})
    garbage = collect_garbage(project.root, kept, remote="store")
    assert set(garbage.objects) == there - needed
    assert set(all_objects(tmp_path / "store")) == there
    assert collect_garbage(project.root, kept, remote="store", apply=True) == garbage
    assert set(all_objects(tmp_path / "store")) == set(all_objects(project.cache)) == needed
    with pytest.raises(QuantlineError, match="nothing-there"):
        collect_garbage(project.root, kept, remote="nothing-there")


def test_what_a_variant_left_that_params_yaml_has_no_more_is_named_and_removed(project):
    (project.root / "variants").mkdir()
    for name in ("one", "two"):
        (project.root / "variants" / f"{name}.yaml").write_text("bits: 4\n")
    (project.root / "artifacts" / "mine").mkdir()
    assert former_outputs(project.root) == []
    project.variants(one="a")
    left = former_outputs(project.root)
    assert [str(place.relative_to(project.root)) for place in left] == ["artifacts/two", "variants/two.yaml"]
    remove_former(left)
    assert former_outputs(project.root) == []
    assert sorted(path.name for path in (project.root / "artifacts").iterdir()) == ["mine", "one"]
    assert [path.name for path in (project.root / "variants").iterdir()] == ["one.yaml"]
    project.variants(one="a", two="b")
    assert "Running stage" not in project.dvc("repro")


def test_what_a_model_left_that_params_yaml_has_no_more_is_named_and_removed(project):
    """Also what one model left, when several came; nothing of a model that stays."""
    (project.root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n"
        + "".join(
            f"  {stage}:\n    cmd: x\n    outs:\n    - path: {path}\n      md5: {'a' * 32}\n"
            for stage, path in {
                "download": "artifacts/shared/download", "quantize@one": "artifacts/one/quantize", "report": "report",
                "download@new": "artifacts/new/shared/download", "quantize@new-one": "artifacts/new/one/quantize",
                "download@old": "artifacts/old/shared/download", "quantize@old-one": "artifacts/old/one/quantize",
                "compose@old-one": "variants/old/one.yaml", "report@old": "report/models/old",
                "report@new": "report/models/new", "code": "code.yaml", "compose_baseline": "metrics.json",
                "fleet_smoke@old": "fleet_smoke/old.json",
            }.items()
        )
    )  # fmt: skip
    for name in ("artifacts/one", "artifacts/shared", "artifacts/new/one", "artifacts/old/one", "artifacts/old/shared",
                 "variants/old", "report/models/old", "report/models/new"):  # fmt: skip
        (project.root / name).mkdir(parents=True, exist_ok=True)
    (project.root / "variants" / "old" / "one.yaml").write_text("bits: 4\n")
    (project.root / "params.yaml").write_text("models:\n  new: model=demo\nvariants:\n  one: a\n")
    left = former_outputs(project.root)
    assert {place.relative_to(project.root).as_posix() for place in left} == {
        "artifacts/shared", "artifacts/one", "artifacts/old/shared", "artifacts/old/one", "variants/old/one.yaml",
        "report/models/old",
    }  # fmt: skip
    remove_former(left)
    assert [path.name for path in (project.root / "artifacts").iterdir() if path.name != "two"] == ["new"]
    assert not (project.root / "variants" / "old").exists()
    assert (project.root / "report" / "models" / "new").is_dir()


def test_what_killed_processes_left_is_removed_and_what_another_machine_makes_is_named(project):
    here = f".quantize.partial-{socket.gethostname()}-1"
    for place in (
        project.root / f".code.yaml.partial-{socket.gethostname()}-1",
        project.root / "scratch" / "one" / here,
        project.root / "artifacts" / "one" / here,
        project.root / "artifacts" / "two" / ".convert.partial-other-1",
    ):
        place.mkdir(parents=True)  # fmt: skip
    said = remove_partial(project.root)
    assert [line.partition(":")[0] for line in said] == [
        f"removed .code.yaml.partial-{socket.gethostname()}-1", f"removed artifacts/one/{here}",
        f"removed scratch/one/{here}", "artifacts/two/.convert.partial-other-1",
    ]  # fmt: skip
    assert [path.name for path in project.root.rglob("*.partial-*")] == [".convert.partial-other-1"]
    assert verify(project.root, project.cache).faults == ()


@pytest.mark.parametrize("command", ["verify", "retention"])
def test_the_commands_that_look_after_a_checkout_remove_what_killed_processes_left(
    project, monkeypatch, capsys, command
):
    left = project.root / "artifacts" / "one" / f".quantize.partial-{socket.gethostname()}-1"
    left.mkdir()
    for stage in (verify_stage, retention_stage):
        monkeypatch.setattr(stage, "ROOT", project.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = verify_stage.verify({}) if command == "verify" else retention_stage.retention(
        {"apply": "false", "keep": "workspace", "remote": None}
    )  # fmt: skip
    assert done == 0
    assert f"removed artifacts/one/{left.name}: half made" in capsys.readouterr().out
    assert not left.exists()


def test_a_lock_whose_variants_could_lead_elsewhere_is_refused(project):
    lock = project.root / "dvc.lock"
    lock.write_text(lock.read_text().replace("artifacts/two/quantize\n", "artifacts/../src/quantize\n"))
    project.variants(one="a")
    with pytest.raises(UserError, match="is of no variant"):
        former_outputs(project.root)
