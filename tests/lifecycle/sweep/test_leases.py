"""What jobs on one machine share by turns."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.sweep.leases import gpus_of, leased, quiet

HOLD = """
import sys
from quantline.lifecycle.sweep.leases import leased
with leased(int(sys.argv[1]), sys.argv[3:], sys.argv[2]) as held:
    print(",".join(held), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def kind():
    return f"test-{os.getpid()}"


@pytest.fixture
def holder(kind, root):
    """Start a process that leases some of the names until its input ends."""
    started = []

    def hold(count, *names):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(count), kind, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(root / "src")},
        )  # fmt: skip
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_two_jobs_hold_different_gpus(kind, holder):
    assert holder(1, "0", "1", "2").stdout.readline().strip() == "0"
    with leased(2, ["0", "1", "2"], kind) as held:
        assert held == ("1", "2")


def test_a_lease_ends_with_a_killed_process_and_who_waits_gets_it(kind, holder):
    first = holder(2, "0", "1")
    assert first.stdout.readline().strip() == "0,1"
    waiting = holder(1, "0", "1")
    first.kill()
    assert waiting.stdout.readline().strip() == "0"


def test_more_than_there_are_is_refused(kind):
    with pytest.raises(UserError, match="a job asks for 2, and this machine has 1"), leased(2, ["0"], kind):
        pass


def test_nothing_is_leased_where_nothing_is_asked_for(kind):
    with leased(0, [], kind) as held:
        assert held == ()


def test_the_visible_gpus_are_those_of_the_variable():
    assert gpus_of({}, ["0", "1"]) == ["0", "1"]
    assert gpus_of({"CUDA_VISIBLE_DEVICES": "3,GPU-aa"}, ["0"]) == ["3", "GPU-aa"]
    assert gpus_of({"CUDA_VISIBLE_DEVICES": ""}, ["0"]) == []


def test_many_compute_beside_each_other_and_one_measures_alone(kind):
    with quiet(alone=False, of=kind), quiet(alone=False, of=kind):
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = f"/tmp/quantline-leases-{os.getuid()}/quiet-{kind}.lock"
        asked = subprocess.run([sys.executable, "-c", code, lock], capture_output=True, text=True, check=False)
        assert "BlockingIOError" in asked.stderr
    with quiet(alone=True, of=kind):
        pass
