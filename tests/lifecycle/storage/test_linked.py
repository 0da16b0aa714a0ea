"""Outputs that are hard links to DVC's cache, by the real DVC; reflinks on a btrfs that is made here where it can be."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from quantline.lifecycle.storage import linked
from quantline.lifecycle.storage.dvc_cache import all_objects, object_path
from quantline.lifecycle.storage.linked import drop_damaged, prefer_reflinks, shares_blocks
from quantline.pipeline.linked import keep_output, mark_of, marks


@pytest.fixture
def linking(project):
    """The project, built anew as .dvc/config says; a copied one has copies for links."""
    shutil.rmtree(project.root / "artifacts")
    shutil.rmtree(project.cache)
    (project.root / "dvc.lock").unlink()
    project.dvc("repro", "-q")
    return project


def write_into(path):
    """As root can, or an editor that keeps links."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"x")
    path.chmod(0o444)


def links(project):
    return [os.stat(object_path(project.cache, name)).st_nlink for name in all_objects(project.cache)]


def test_an_output_and_its_object_are_one_file_that_is_read_only(linking):
    weights = linking.root / "artifacts" / "one" / "quantize" / "model.safetensors"
    assert weights.stat().st_nlink == 2
    assert weights.stat().st_mode & 0o222 == 0
    assert sorted(links(linking)) == [1, 1, 2, 2, 2, 2, 2]  # lists of folders are in the cache alone
    assert drop_damaged(linking.root) == []


def test_an_object_that_was_written_to_leaves_the_cache_and_is_made_again(linking):
    before = linking.content()
    write_into(linking.root / "artifacts" / "one" / "quantize" / "model.safetensors")
    assert linking.content() != before
    # Without this, DVC puts the wrong bytes back, and calls the project up to date.
    assert drop_damaged(linking.root) == ["artifacts/one/quantize/model.safetensors"]
    linking.dvc("repro", "-q")
    assert linking.content() == before
    assert drop_damaged(linking.root) == []


def test_an_object_that_is_as_it_was_is_read_once(linking, monkeypatch):
    assert drop_damaged(linking.root) == []
    monkeypatch.setattr(linked, "md5_of", pytest.fail)
    assert drop_damaged(linking.root) == []


def test_what_a_stage_has_just_written_is_not_read_and_a_written_object_is_not_taken_for_it(linking, monkeypatch):
    outputs = [linking.root / "artifacts" / name for name in ("one", "two")]
    keep_output(linking.root, outputs)
    with monkeypatch.context() as patch:
        patch.setattr(linked, "md5_of", pytest.fail)
        assert drop_damaged(linking.root) == []
    weights = outputs[0] / "quantize" / "model.safetensors"
    write_into(weights)
    keep_output(linking.root, outputs)  # a later stage that carries the file over
    assert mark_of(weights.stat()) not in marks(linking.cache)
    assert len(drop_damaged(linking.root)) == 1


def test_a_copy_is_not_looked_at(linking, monkeypatch):
    linking.dvc("config", "cache.type", "copy")
    linking.dvc("checkout", "--relink", "-q")
    assert set(links(linking)) == {1}
    monkeypatch.setattr(linked, "md5_of", pytest.fail)
    write_into(linking.root / "artifacts" / "one" / "quantize" / "model.safetensors")
    assert drop_damaged(linking.root) == []


def test_a_file_system_without_reflinks_changes_nothing(linking):
    if shares_blocks(linking.root):
        pytest.skip("this file system has reflinks")
    assert not prefer_reflinks(linking.root)
    assert not (linking.root / ".dvc" / "config.local").exists()
    assert not list(linking.root.glob(".reflink*"))


@pytest.fixture
def btrfs(tmp_path):
    """A file system with reflinks."""
    image, place = tmp_path / "image", tmp_path / "btrfs"
    if os.getuid() or shutil.which("mkfs.btrfs") is None:
        pytest.skip("no mkfs.btrfs here, or no right to mount")
    with image.open("wb") as file:
        file.truncate(200 * 2**20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    place.mkdir()
    if subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_reflinks_are_taken_where_there_are_some_and_a_write_into_an_output_leaves_the_object(btrfs, built_project):
    project = built_project.clone(btrfs / "project")
    assert prefer_reflinks(project.root)
    assert not prefer_reflinks(project.root)  # once
    project.dvc("repro", "-q")
    before = project.content()
    assert set(links(project)) == {1}
    write_into(project.root / "artifacts" / "one" / "quantize" / "model.safetensors")
    assert drop_damaged(project.root) == []
    project.dvc("checkout", "-q", "--force")
    assert project.content() == before
