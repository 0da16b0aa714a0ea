from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantline.core.errors import DifferentError, UserError
from quantline.core.files import (
    building,
    clear,
    copy_file,
    disk_full,
    foreign,
    partial,
    read_json,
    replaced,
    to_be_made,
    write_json,
)


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


HOLD = """\
import sys, time
from pathlib import Path
from quantline.core.files import partial
with partial(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def source(root):
    """The environment of another process that imports the code under test."""
    return {**os.environ, "PYTHONPATH": str(root / "src")}


@contextmanager
def holding(path, source):
    """Another process that makes `path`, and its folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env=source, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_stays(tmp_path, source):
    path = tmp_path / "out"
    with holding(path, source) as (process, made), partial(path) as own:
        reused = tmp_path / f".out.partial-{socket.gethostname()}-{os.getppid()}"
        reused.mkdir()
        assert clear(tmp_path) == [reused]
        assert (made / "half").exists()
        assert own.exists()
        process.kill()
        process.wait()
        assert clear(tmp_path, "other") == []
        assert clear(tmp_path, "out") == [made]
    assert list(tmp_path.iterdir()) == []


def test_what_another_host_makes_is_never_removed(tmp_path, monkeypatch):
    own = socket.gethostname()
    others = sorted(tmp_path / f".out.partial-{name}-7" for name in ("elsewhere", f"{own}-2", f"{own}.domain"))
    for place in others:
        place.mkdir()
    assert clear(tmp_path) == []
    assert foreign(tmp_path) == others
    with building(tmp_path / "out") as folder:
        assert len(foreign(tmp_path)) == 3
        (folder / "file").write_text("x")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "out"])


def test_many_processes_that_make_and_clear_at_once_do_not_take_each_others(tmp_path, source):
    code = (
        "import sys\nfrom pathlib import Path\nfrom quantline.core.files import write_json\n"
        "for number in range(150): write_json(Path(sys.argv[1]), {'a': number})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.json")], env=source) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": 149}


@pytest.mark.parametrize("kind", ["killed", "interrupted"])
def test_the_former_folder_is_back_where_the_new_one_was_cut_off_between_the_renames(tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    with building(out) as folder:
        (folder / "file").write_text("first")
    rename, calls = os.replace, iter(range(10))

    def cut_off(*names):
        if next(calls) == 1:
            if kind == "killed":
                os._exit(9)
            raise KeyboardInterrupt
        rename(*names)

    def build():
        with building(out) as folder:
            (folder / "file").write_text("second")

    monkeypatch.setattr("quantline.core.files.os.replace", cut_off)
    if kind == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            build()
    elif (child := os.fork()) == 0:
        try:
            build()
        finally:
            os._exit(1)
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not out.exists()
    monkeypatch.undo()
    clear(tmp_path)
    assert (out / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [UserError, DifferentError, ValueError])
def test_an_error_names_the_folder_that_stays_not_the_one_that_goes(tmp_path, error):
    def fail():
        with building(tmp_path / "out") as folder:
            raise error(f"{folder}/model/a: is damaged, and so is {folder}")

    with pytest.raises(error) as caught:
        fail()
    assert str(caught.value) == f"{tmp_path}/out/model/a: is damaged, and so is {tmp_path}/out"


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.EOPNOTSUPP])
def test_a_copy_has_the_content_also_between_file_systems_and_where_nothing_can_be_shared(tmp_path, monkeypatch, error):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(3_000_001))
    target.write_bytes(b"longer" * 1_000_000)
    real, calls = os.copy_file_range, []

    def copy(origin, to, count):
        calls.append(count)
        if error and len(calls) == 2:  # after a part
            raise OSError(error, os.strerror(error))
        return real(origin, to, min(count, 1_000_000))

    monkeypatch.setattr(os, "copy_file_range", copy)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert len(calls) == (2 if error else 4)


def test_a_copy_on_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("1")
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        copy_file(tmp_path / "a", tmp_path / "b")


def test_a_path_in_a_temporary_folder_is_named_as_what_it_becomes(tmp_path):
    with building(tmp_path / "out.json") as made:
        assert to_be_made(made) == str(tmp_path / "out.json")
        assert to_be_made(made / "a" / "b") == str(tmp_path / "out.json" / "a" / "b")
        assert to_be_made(made.parent) == str(tmp_path / "out.json")
        assert str(disk_full(made.parent)).startswith(f"{tmp_path}/out.json: the disk is full")
    assert to_be_made(tmp_path / ".hidden") == str(tmp_path / ".hidden")
