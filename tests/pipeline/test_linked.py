from __future__ import annotations

import os

import pytest

from quantline.pipeline.linked import MARKS, keep, keep_output, mark_of, marks


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / ".dvc" / "cache").mkdir(parents=True)
    (tmp_path / ".dvc" / "config").write_text("")
    return tmp_path


def test_a_mark_stays_when_a_file_is_linked_and_made_read_only_and_changes_when_it_is_written_to(tmp_path):
    path = tmp_path / "a"
    path.write_text("1")
    before = mark_of(path.stat())
    (tmp_path / "b").hardlink_to(path)
    path.chmod(0o444)
    assert mark_of((tmp_path / "b").stat()) == before
    path.chmod(0o644)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert mark_of(path.stat()) != before


def test_files_and_folders_are_kept_beside_what_was_known(checkout):
    out, result = checkout / "out" / "deep", checkout / "out.json"
    out.mkdir(parents=True)
    (out / "a").write_text("1")
    result.write_text("{}")
    cache = checkout / ".dvc" / "cache"
    keep(cache, {"1:2:3"})
    keep_output(checkout, [checkout / "out", result])
    assert marks(cache) == {"1:2:3", mark_of((out / "a").stat()), mark_of(result.stat())}


def test_a_known_file_that_was_written_to_keeps_its_old_mark(checkout):
    path = checkout / "a"
    path.write_text("1")
    keep_output(checkout, [path])
    before = marks(checkout / ".dvc" / "cache")
    path.write_text("22")
    keep_output(checkout, [path])
    assert marks(checkout / ".dvc" / "cache") == before


@pytest.mark.parametrize("text", ["", "{", "3"])
def test_marks_that_cannot_be_read_are_none(checkout, text):
    (checkout / ".dvc" / "cache" / MARKS).write_text(text)
    assert marks(checkout / ".dvc" / "cache") == set()
