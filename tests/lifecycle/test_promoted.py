"""What promoted variants need: lost objects come back from a remote, else the message says which variant to let go."""

from __future__ import annotations

import shutil

import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.backup import backup
from quantline.lifecycle.promoted import promoted, require_whole
from quantline.lifecycle.retention import collect_garbage
from quantline.lifecycle.storage.dvc_cache import all_objects, object_path, objects_of, opened
from quantline.lifecycle.storage.dvc_lock import read_lock
from quantline.lifecycle.verify import verify

DEMOTE = "python -m stages.demote variant=one alias=production"


@pytest.fixture
def former(project, tmp_path):
    """`one` was promoted and pushed, then changed: dvc.lock does not have the promoted one any more."""
    (one,) = [output.md5 for output in read_lock(project.root) if output.path == "artifacts/one/quantize"]
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    project.dvc("push", "-q")
    whole = objects_of(project.cache, [one])
    project.variants(one="c")
    project.dvc("repro", "-q", "quantize@one")
    current = objects_of(project.cache, [output.md5 for output in read_lock(project.root)])
    (weights,) = whole - current - {one}  # the configurations are equal
    return project, one, weights


def test_without_a_registry_nothing_is_promoted(tmp_path):
    assert promoted(tmp_path) == {}


@pytest.mark.parametrize("lost", ["the list", "a file", "all"])
def test_what_the_cache_lost_of_a_promoted_variant_is_brought_from_the_remote_as_dvc_pull_cannot(former, lost):
    project, one, weights = former
    gone = {"the list": {one}, "a file": {weights}, "all": {one, weights}}[lost]
    for md5 in gone:
        object_path(project.cache, md5).unlink()
    project.dvc("pull", "-q", "--run-cache")
    assert not object_path(project.cache, min(gone)).exists()
    assert collect_garbage(project.root, {one: DEMOTE}).protected == 3
    assert {one, weights} <= set(all_objects(project.cache))


def test_a_backup_holds_what_the_cache_had_lost_of_a_promoted_variant(former, tmp_path):
    project, one, weights = former
    object_path(project.cache, one).unlink()
    backup(project.root, tmp_path / "backup", also={one: DEMOTE})
    assert all((tmp_path / "backup" / "objects" / "md5" / md5[:2] / md5[2:]).is_file() for md5 in (one, weights))


def test_what_no_remote_has_is_refused_with_the_command_that_lets_the_variant_go(former, tmp_path):
    project, one, _ = former
    object_path(project.cache, one).unlink()
    shutil.rmtree(tmp_path / "store")
    for asked in (
        lambda: collect_garbage(project.root, {one: DEMOTE}, apply=True),
        lambda: backup(project.root, tmp_path / "backup", also={one: DEMOTE}),
    ):
        with pytest.raises(UserError, match=rf"a promoted variant needs it \(no remote has it\); .*: {DEMOTE}$"):
            asked()
    with opened(project.root) as repo, pytest.raises(UserError, match=r"remote=nope: DVC has no such remote; .* store"):
        require_whole(repo, project.cache, {one: DEMOTE}, "nope")
    project.dvc("remote", "modify", "store", "url", "ssh://127.0.0.1:1/nowhere")
    with opened(project.root) as repo, pytest.raises(UserError, match="the remote store could not be read"):
        require_whole(repo, project.cache, {one: DEMOTE})


def test_a_damaged_object_of_a_promoted_variant_is_not_said_to_be_needed_by_nobody(former):
    project, one, _ = former
    path = object_path(project.cache, one)
    path.chmod(0o644)
    path.write_bytes(b"[")
    (fault,) = verify(project.root, project.cache, {one: DEMOTE}).faults
    assert (fault.where, fault.variant) == (str(path), "a promoted variant")
    assert (
        fault.remedy
        == f"`rm -f {path}`, then `python -m stages.retention`, which gets it from the remote, or `{DEMOTE}`"
    )
    path.unlink()
    collect_garbage(project.root, {one: DEMOTE})
    assert verify(project.root, project.cache, {one: DEMOTE}).faults == ()
