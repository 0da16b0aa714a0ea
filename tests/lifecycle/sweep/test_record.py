"""A sweep's folder: what was asked for, and a record of every job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.sweep.record import (
    JobRecord,
    Sweep,
    new_home,
    read_job,
    read_sweep,
    sweeps,
    write_job,
    write_sweep,
)


@pytest.fixture
def made(tmp_path):
    sweep = Sweep(
        new_home(tmp_path), tmp_path, ("a", "b"), "local", 2, 0, None, tmp_path / "cache", ("timeout_min=5",), "convert"
    )
    write_sweep(sweep)
    return sweep


def test_a_sweep_is_read_as_it_was_written(made):
    assert read_sweep(made.home) == made
    assert sweeps(made.root) == [made.home]
    assert read_job(made, "b") == JobRecord("b")


def test_a_folder_without_a_sweep_is_refused_with_what_names_them(tmp_path):
    with pytest.raises(UserError, match=r"holds no sweep; `python -m stages\.sweep list`"):
        read_sweep(tmp_path)


def test_a_job_whose_process_is_gone_has_failed(made):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_job(made, JobRecord("a", "running", socket.gethostname(), gone.pid))
    assert (read_job(made, "a").state, read_job(made, "a").fault) == ("failed", "its process was killed")
    write_job(made, JobRecord("a", "running", socket.gethostname(), os.getpid()))
    assert read_job(made, "a").state == "running"
    # Another machine's processes cannot be seen from here.
    write_job(made, JobRecord("a", "running", "another-machine", gone.pid))
    assert read_job(made, "a").state == "running"
