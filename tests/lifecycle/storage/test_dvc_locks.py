"""Two `dvc repro` in one checkout, and one that is killed: what DVC says and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from quantline.lifecycle.verify import verify

WAIT = """\
import time
from pathlib import Path
while Path("wait").exists():
    Path("waiting").touch()
    time.sleep(0.05)
"""


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
    said = project.dvc("repro")
    assert said.count("Running stage") == 2
    assert project.content() == built_project.content()
    assert verify(project.root, project.cache).faults == ()
