from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantline.core.files import building, read_json, replaced, write_json


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path):
    path = tmp_path / "folder" / "file"
    for text in ("first", "second"):
        with replaced(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with replaced(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    steps = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr("quantline.core.files.os.fsync", lambda file: (steps.append("sync"), sync(file)))
    monkeypatch.setattr("quantline.core.files.os.replace", lambda *names: (steps.append("rename"), rename(*names)))
    write_json(tmp_path / "file.json", {"a": 1})
    assert steps == ["sync", "rename", "sync"]
    assert read_json(tmp_path / "file.json") == {"a": 1}


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    out = tmp_path / "out"

    def build(text, fail=False):
        with building(out) as folder:
            (folder / "file").write_text(text)
            if fail:
                raise OSError("broken")

    build("first")
    with pytest.raises(OSError, match="broken"):
        build("second", fail=True)
    assert (out / "file").read_text() == "first"
    build("third")
    assert (out / "file").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_temporary_file_of_a_killed_process_is_removed_and_that_of_a_running_one_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number in (ended.pid, os.getpid(), os.getppid()):
        (tmp_path / f"a.json.{number}.tmp").write_text("half")
    with replaced(tmp_path / "a.json") as temporary:
        assert not temporary.exists()
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", f"a.json.{os.getppid()}.tmp"]
