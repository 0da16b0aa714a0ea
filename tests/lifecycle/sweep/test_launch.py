"""How jobs are started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.sweep import launch
from quantline.lifecycle.sweep.record import Sweep, new_home, write_sweep
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
    with pytest.raises(UserError, match="sbatch is not installed here"):
        launch.submit_array(sweep_of(tmp_path))


def test_a_launcher_that_is_not_installed_is_refused_by_what_lacks(tmp_path):
    with pytest.raises(
        UserError, match=rf"toolchains\.sweep={sys.executable}: its health check failed.*No module named"
    ):
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
