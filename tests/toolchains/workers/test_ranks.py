from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from quantline.core.errors import UserError, WorkerError
from quantline.toolchains import toolchain
from quantline.toolchains.runner import run_worker
from quantline.toolchains.toolchain import Toolchain
from quantline.toolchains.workers.ranks import Team

# Each rank notes its process, does what the job says, and rank 0 gathers what the others return.
BODY = """
import os, time
from pathlib import Path
from quantline.toolchains.protocol import JobError, worker_main
from quantline.toolchains.workers.ranks import team
def run(job, report):
    with team("work", job, Path(job["output"])) as ranks:
        Path(job["notes"], str(ranks.rank)).write_text(str(os.getpid()))
        {run}
        own = sum(job["items"][ranks.share])
        return {{"own": own, "rank": ranks.rank, "others": ranks.results(), "size": ranks.size}}
if __name__ == "__main__":
    worker_main(run)
"""


@pytest.fixture
def together(tmp_path):
    """Run a job of several ranks; gives its data."""

    def start(gpus, run="pass"):
        (tmp_path / "work.py").write_text(BODY.format(run=run))
        (tmp_path / "notes").mkdir()
        path = os.pathsep.join([str(tmp_path), toolchain.worker_environment(1)["PYTHONPATH"]])
        job = {
            "output": str(tmp_path / "out"),
            "notes": str(tmp_path / "notes"),
            "items": list(range(10)),
            "gpus": gpus,
        }
        return run_worker(
            Toolchain("reference", Path(sys.executable), None), "work", job, log=tmp_path / "work.log", threads=1,
            label="ranks", extra_environment={"PYTHONPATH": path},
        ).data  # fmt: skip

    return start


def ended(folder):
    """Whether no process of any rank is left, within a moment."""
    deadline = time.monotonic() + 10
    pids = [path.read_text() for path in folder.iterdir()]
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_each_rank_has_its_share_and_rank_0_gets_what_the_others_return(together, tmp_path):
    found = together(3)
    assert [found["own"], *(other["own"] for other in found["others"])] == [0 + 3 + 6 + 9, 1 + 4 + 7, 2 + 5 + 8]
    assert [other["rank"] for other in found["others"]] == [1, 2]
    assert not list((tmp_path / "out").iterdir())
    assert ended(tmp_path / "notes")


def test_a_job_for_one_gpu_starts_no_other_process(together, tmp_path):
    found = together(1)
    assert (found["own"], found["size"], found["others"]) == (45, 1, [])
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["0"]


def test_the_message_of_a_rank_that_refuses_ends_the_job_although_rank_0_waits_for_it(together, tmp_path):
    with pytest.raises(UserError, match="rank 1 cannot do this"):
        together(
            3, "if ranks.rank == 1: raise JobError('rank 1 cannot do this')\n        if not ranks.rank: time.sleep(60)"
        )
    assert ended(tmp_path / "notes")


def test_a_rank_that_is_killed_ends_the_job_and_is_named(together, tmp_path):
    with pytest.raises(WorkerError, match="rank 2 of 3 was killed by signal 9"):
        together(3, "if ranks.rank == 2: os.kill(os.getpid(), 9)\n        if ranks.rank < 2: time.sleep(60)")
    assert ended(tmp_path / "notes")


def test_the_other_ranks_end_with_rank_0_however_it_ends(together, tmp_path):
    wait = "while len(os.listdir(job['notes'])) < 2: time.sleep(0.01)\n        "
    with pytest.raises(WorkerError, match="killed by signal 9"):
        together(2, wait + "if not ranks.rank: os.kill(os.getpid(), 9)\n        time.sleep(60)")
    assert ended(tmp_path / "notes")


def test_only_with_several_gpus_a_rank_has_a_gpu_of_its_own(tmp_path):
    assert Team().device("cuda") == "cuda"
    assert [Team(2, rank, tmp_path).device("cuda") for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert Team(2, 1, tmp_path).device("cpu") == "cpu"
