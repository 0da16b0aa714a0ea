"""How jobs are started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantline.core.errors import UserError, WorkerError
from quantline.lifecycle.sweep import launch, run
from quantline.lifecycle.sweep.record import Sweep, new_home, read_jobs, write_sweep
from quantline.lifecycle.sweep.run import Asked, run_jobs


def sweep_of(root, **changes):
    given = {"variants": ("a", "b", "c"), "launcher": "slurm", "workers": 2, "gpus": 0, "remote": None, "cache": root}
    return Sweep(new_home(root), root, **{**given, **changes})


def test_the_array_of_slurm_is_a_script_that_runs_the_job_of_its_number(tmp_path):
    made = sweep_of(tmp_path, gpus=1, settings=("partition=gpu", "time=60"))
    made.project.mkdir()
    text = launch.array_script(made)
    assert "#SBATCH --array=0-2%2\n" in text
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --gpus-per-node=1\n" in text
    # bash itself says which command a task runs
    shown = text.replace("exec ", "echo ")
    script = tmp_path / "array.sh"
    script.write_text(shown)
    done = subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == launch.command_of(made, "b")


def test_without_slurm_a_detached_sweep_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for detach, lacks in ((True, "sbatch"), (False, "sbatch")):
        with pytest.raises(UserError, match=f"launcher=slurm: {lacks} is not installed here; .*launcher=local"):
            launch.require_launcher("slurm", detach=detach)
    launch.require_launcher("local", detach=False)


def test_a_sweep_that_slurm_refuses_is_not_left_waiting_for_ever(tmp_path):
    made = sweep_of(tmp_path)
    made.home.mkdir(parents=True, exist_ok=True)
    done = subprocess.CompletedProcess([], 1, "", "Invalid partition")
    with pytest.raises(UserError, match="sbatch refused the array: Invalid partition; correct settings="):
        launch.submit_array(made, run=lambda *_, **__: done)
    assert not made.home.exists()


def test_the_jobs_of_a_launcher_that_failed_are_not_left_waiting_for_ever(tmp_path, monkeypatch):
    made = sweep_of(tmp_path, launcher="ray", variants=("a",))
    write_sweep(made)

    def failing(*_: object, **__: object) -> None:
        raise WorkerError("launcher=ray failed")

    monkeypatch.setattr(run, "start", failing)
    with pytest.raises(WorkerError):
        run_jobs(made, Asked(retries=0))
    (job,) = read_jobs(made)
    assert (job.state, job.fault) == ("failed", "launcher=ray failed")


def test_a_launcher_that_is_not_installed_is_refused_by_what_lacks(tmp_path):
    with pytest.raises(UserError, match=rf"^python={sys.executable}: its health check failed.*No module named"):
        launch.start(sweep_of(tmp_path, launcher="ray"), ["a"], python=sys.executable)


def test_as_many_jobs_run_as_were_asked_for_or_as_the_gpus_allow():
    assert launch.workers_for(3, 0, 0) == 3
    assert launch.workers_for(None, 2, 8) == 4
    assert launch.workers_for(None, 0, 0) == max(1, (os.cpu_count() or 1) // 4)


def test_a_job_that_ends_before_it_begins_has_failed_and_its_output_is_kept(tmp_path):
    made = sweep_of(tmp_path, launcher="local", variants=("a",))
    made.project.mkdir()  # no code is in it
    write_sweep(made)
    (job,) = run_jobs(made, Asked(retries=0))
    assert (job.state, job.fault) == ("failed", f"it ended before it began; log: {launch.launcher_log(made)}")
    assert "No module named" in launch.launcher_log(made).read_text()
