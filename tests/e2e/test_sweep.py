"""`stages.sweep`: variants built beside each other, and the proof that the checkout has nothing left to run."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from checkout import copy_checkout, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.toolchain("reference")]
# Calibrating runs in the core's own environment, so that a job takes seconds.
SWEEP = ("python", "-m", "stages.sweep", "until=calibrate", "workers=2")


@pytest.fixture(scope="module")
def copy(tmp_path_factory, root):
    copy = copy_checkout(root, tmp_path_factory.mktemp("sweep") / "copy")
    (copy.root / "params.yaml").write_text(
        "shared: model=demo calibration=demo calibration.seq_len=64\nbaseline: method=float\nvariants:\n"
        "  few: method=gptq calibration.n_samples=2\n  more: method=gptq calibration.n_samples=4\n"
    )
    return copy


def jobs_of(copy):
    home = sorted((copy.root / "scratch" / "sweep").glob("*/jobs"))[-1]
    return {path.stem: json.loads(path.read_text()) for path in home.glob("*.json")}


def test_jobs_beside_each_other_leave_nothing_to_run(copy):
    done = copy.run(*SWEEP)
    assert done.code == 0, done.text
    assert "`dvc repro` here had nothing to run" in done.err
    assert {name: (job["state"], job["again"]) for name, job in jobs_of(copy).items()} == {
        "few": ("done", ["calibrate@few"]), "more": ("done", ["calibrate@more"]),
    }  # fmt: skip
    assert copy.result("more", "calibrate")["metrics"]["samples"] == 4
    assert not list((copy.root / "scratch" / "sweep").glob("*/areas/*"))


def kill_more(copy):
    """Start a sweep without retries and kill -9 the job of `more` while it runs; return how the sweep ended."""
    seen = set((copy.root / "scratch" / "sweep").glob("*/jobs"))
    process = copy.start(*SWEEP, "retries=0")

    def running():
        homes = set((copy.root / "scratch" / "sweep").glob("*/jobs")) - seen
        return bool(homes) and jobs_of(copy).get("more", {}).get("state") == "running"

    wait_for(running, process, 120)
    os.kill(jobs_of(copy)["more"]["pid"], signal.SIGKILL)
    out, err = process.communicate()
    return process.returncode, out + err


def test_a_killed_job_is_a_row_and_the_next_sweep_runs_what_lacks(copy):
    params = copy.root / "params.yaml"
    params.write_text(params.read_text().replace("n_samples=4", "n_samples=5").replace("n_samples=2", "n_samples=3"))
    code, text = kill_more(copy)
    assert code == 1, text
    assert re.search(r"more +failed .* its process was killed", text)
    assert re.search(r"few +done", text)
    assert copy.staying() == []
    done = copy.run(*SWEEP)
    assert done.code == 0, done.text
    assert {name: job["again"] for name, job in jobs_of(copy).items()} == {"few": [], "more": ["calibrate@more"]}
    assert copy.result("more", "calibrate")["metrics"]["samples"] == 5
