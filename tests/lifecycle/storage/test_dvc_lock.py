"""dvc.lock that is cut off, or that DVC writes just now; two `dvc repro` in one checkout, and one that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from dvc.lock import Lock
from zc.lockfile import LockError, LockFile

from quantline.core.errors import UserError
from quantline.lifecycle.retention import collect_garbage
from quantline.lifecycle.storage.dvc_cache import all_objects
from quantline.lifecycle.storage.dvc_lock import held, read_lock, require_whole, stage_keys
from quantline.lifecycle.storage.dvc_outputs import variant_lock
from quantline.lifecycle.verify import verify

WAIT = """\
import time
from pathlib import Path
while Path("wait").exists():
    Path("waiting").touch()
    time.sleep(0.05)
"""


def test_the_stages_of_a_variant_and_of_the_baseline_are_those_of_dvc_yaml(root):
    known = set(yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    of_float = set(stage_keys("float").values())
    assert of_float <= known
    assert {name for name in known if name.endswith("_baseline")} - of_float == {"compose_baseline"}
    assert {key.partition("@")[0] for key in stage_keys("mine").values()} <= known


def test_no_beginning_of_a_lock_passes_for_the_whole(project):
    path = project.root / "dvc.lock"
    whole = path.read_text()
    full = {name: variant_lock(project.root, name) for name in ("one", "two")}
    assert [len(lock[f"quantize@{name}"]["outs"]) for name, lock in full.items()] == [2, 2]
    require_whole(project.root)
    lines = [at + 1 for at, letter in enumerate(whole[:-1]) if letter == "\n"]
    passed, said = [], set()
    for at in sorted({*lines, *range(0, len(whole), 7)}):
        path.write_text(whole[:at])
        try:
            require_whole(project.root)
        except UserError as error:
            said.add(re.sub(r"quantize@\w+(, )?", "", str(error)))
        else:
            passed.append(whole[at:])
        try:
            found = {name: variant_lock(project.root, name) for name in full}
        except UserError:
            continue
        for name, lock in found.items():
            assert not lock or [out["md5"] for out in lock[f"quantize@{name}"]["outs"]] == [
                out["md5"] for out in full[name][f"quantize@{name}"]["outs"]
            ]
    assert len(said) == 2
    assert all("run `dvc repro`" in text for text in said)
    assert all(re.fullmatch(r"      size: \d+\n", rest) for rest in passed), "only a size may lack"
    path.write_text(whole)


def test_a_stage_that_dvc_lock_lacks_is_a_fault_and_repro_mends_it(project):
    path = project.root / "dvc.lock"
    path.write_text(path.read_text().partition("  quantize@two:")[0])
    (fault,) = verify(project.root, project.cache).faults
    assert (fault.where, fault.variant) == ("dvc.lock", "two")
    assert "quantize@two" in fault.what
    before = project.content()
    project.dvc("repro")
    assert verify(project.root, project.cache).faults == ()
    assert project.content() == before


def test_a_lock_that_dvc_writes_just_now_is_read_when_it_is_whole(project):
    path = project.root / "dvc.lock"
    whole, wanted = path.read_text(), read_lock(project.root)
    lock = Lock(str(project.root / ".dvc" / "tmp" / "lock"))
    lock.lock()
    path.write_text(whole[: len(whole) // 2])

    def finish():
        path.write_text(whole)
        lock.unlock()

    writer = threading.Timer(0.7, finish)
    writer.start()
    try:
        assert read_lock(project.root) == wanted
    finally:
        writer.join()


def test_while_a_dvc_command_works_reading_is_refused_and_a_reader_is_in_dvcs_way(project):
    lock = Lock(str(project.root / ".dvc" / "tmp" / "lock"))
    with lock, pytest.raises(UserError, match="a `dvc` command is working here; run this again when it has ended"):
        read_lock(project.root)
    with held(project.root), held(project.root):
        assert len(read_lock(project.root)) == 4
        with pytest.raises(LockError):
            LockFile(lock.lockfile)
    LockFile(lock.lockfile).close()


@pytest.fixture
def waiting(project):
    """A `dvc repro` that runs its first stage until the file `wait` is gone."""
    make = project.root / "make.py"
    make.write_text(WAIT + make.read_text())
    (project.root / "wait").touch()
    variables = {**os.environ, "PYTHONPATH": str(project.source), "DVC_NO_ANALYTICS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"], cwd=project.root, env=variables, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (project.root / "waiting").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield project, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_second_repro_at_once_is_refused_by_the_process_that_is_in_its_way_and_harms_nothing(waiting):
    project, first = waiting
    said = project.dvc("repro", code=255)
    assert "Traceback" not in said
    assert "is busy, it is being blocked by" in said
    assert str(first.pid) in said
    there = set(all_objects(project.cache))
    with pytest.raises(
        UserError, match=rf"makes outputs here \(process {first.pid}: .*run this again when it has ended"
    ):
        collect_garbage(project.root, {}, apply=True)
    assert set(all_objects(project.cache)) == there
    (project.root / "wait").unlink()
    out = first.communicate(timeout=240)[0]
    assert first.returncode == 0, out
    assert verify(project.root, project.cache).faults == ()
    assert "up to date" in project.dvc("repro")


def test_after_kill_9_the_next_repro_completes_with_the_same_outputs(waiting, built_project):
    project, first = waiting
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (project.root / "wait").unlink()
    assert not (project.root / "artifacts" / "one" / "quantize").exists(), "it was cut off in the middle"
    collect_garbage(project.root, {})  # DVC's list still has the process, which lives no more
    said = project.dvc("repro")
    assert said.count("Running stage") == 2
    assert project.content() == built_project.content()
    assert verify(project.root, project.cache).faults == ()
