from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantline.core.errors import UserError, WorkerError
from quantline.toolchains import toolchain
from quantline.toolchains.runner import early_worker
from quantline.toolchains.toolchain import Toolchain

HERE = Toolchain("reference", Path(sys.executable), None)
# Notes its process once it has imported, so that a test can see when that is.
BODY = """
import os, time
from pathlib import Path
from quantline.toolchains.protocol import JobError, worker_main
HERE = Path(__file__).parent
def imports():
    (HERE / "new").write_text(str(os.getpid()))
    (HERE / "new").rename(HERE / "pid")
    {imports}
def run(job, report):
    {run}
worker_main(run, imports)
"""


def within(seconds, check):
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.02)
    return check()


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def waiting(tmp_path):
    """Start a worker early; gives how to ask it, once it has imported."""

    @contextmanager
    def start(run="return {'twice': 2 * job['x']}", imports="pass"):
        (tmp_path / "work.py").write_text(BODY.format(run=run, imports=imports))
        path = os.pathsep.join([str(tmp_path), toolchain.worker_environment(1)["PYTHONPATH"]])
        with early_worker(
            HERE, "work", log=tmp_path / "work.log", threads=1, extra_environment={"PYTHONPATH": path}
        ) as ask:
            assert within(20, (tmp_path / "pid").exists)
            yield ask

    return start


def test_a_worker_that_has_imported_gets_its_job_later(waiting, tmp_path):
    with waiting() as ask:
        result = ask({"x": 21}, "work")
    assert result.data == {"twice": 42}
    assert gone((tmp_path / "pid").read_text())


def test_a_worker_that_nobody_asks_ends_with_the_block(waiting, tmp_path):
    with waiting():
        pid = (tmp_path / "pid").read_text()
        assert not gone(pid)
    assert gone(pid)
    assert not (tmp_path / "work.log").exists()


def test_a_block_that_fails_ends_the_worker_and_keeps_its_error(waiting, tmp_path):
    with pytest.raises(ZeroDivisionError), waiting():
        raise ZeroDivisionError
    assert gone((tmp_path / "pid").read_text())


def test_a_refusal_is_that_of_a_worker_started_in_time(waiting):
    with pytest.raises(UserError, match="x=7: no"), waiting(run="raise JobError('x=7: no')") as ask:
        ask({}, "work")


def test_a_worker_that_died_while_it_waited_is_told_with_its_log(waiting, tmp_path):
    with waiting(imports="print('out of luck', flush=True); os._exit(9)") as ask:
        assert within(10, lambda: "Z" in Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat").read_text())
        with pytest.raises(WorkerError, match=r"exited with code 9 and without a result.*work\.log\n  \| out of luck"):
            ask({}, "work")


@pytest.mark.e2e
def test_a_waiting_worker_does_not_outlive_its_parent(tmp_path):
    (tmp_path / "work.py").write_text(BODY.format(run="return {}", imports="pass"))
    source = toolchain.worker_environment(1)["PYTHONPATH"]
    path = os.pathsep.join([str(tmp_path), source])
    parent = (
        "import sys, time; from pathlib import Path\n"
        "from quantline.toolchains.runner import early_worker; from quantline.toolchains.environments import Toolchain\n"
        f"with early_worker(Toolchain('reference', Path(sys.executable), None), 'work', log=Path({str(tmp_path / 'log')!r}),"
        f" threads=1, extra_environment={{'PYTHONPATH': {path!r}}}): time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)}
    )
    assert within(20, (tmp_path / "pid").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert within(10, lambda: gone((tmp_path / "pid").read_text()))
