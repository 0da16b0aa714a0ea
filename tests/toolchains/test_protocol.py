from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

WORKER = """
from quantline.toolchains.protocol import JobError, worker_main
def run(job, report):
    report(1, 2, "half")
    if job["how"] == "refuse":
        raise JobError("not with these bits")
    if job["how"] == "fail":
        raise ValueError("broken")
    if job["how"] == "full":
        raise OSError(28, "No space left on device")
    return {"got": job["how"]}
worker_main(run, lambda: print("imported", flush=True))
"""


@pytest.fixture
def work(root, tmp_path):
    def started(how, *flags, stdin=""):
        job, result = tmp_path / "job.json", tmp_path / "result.json"
        job.write_text(json.dumps({"how": how}))
        (tmp_path / "worker.py").write_text(WORKER)
        command = [sys.executable, tmp_path / "worker.py", job, result, *flags]
        environment = {**os.environ, "PYTHONPATH": str(root / "src")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, input=stdin, env=environment)
        return done, json.loads(result.read_text()) if result.exists() else None

    return started


def test_a_result_has_the_workers_data_its_time_memory_and_versions(work):
    done, result = work("well")
    assert (done.returncode, result["ok"], result["data"]) == (0, True, {"got": "well"})
    assert result["seconds"] >= 0
    assert result["peak_memory_bytes"] > 2**20
    assert result["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert '@progress {"done": 1, "total": 2, "label": "half"}' in done.stdout


@pytest.mark.parametrize(
    ("how", "code", "kind", "message"),
    [
        ("refuse", 3, "user", "not with these bits"),
        ("fail", 4, "internal", "ValueError: broken"),
        ("full", 4, "disk", "OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_refusal_comes_without_a_traceback_and_a_failure_with_one(work, how, code, kind, message):
    done, result = work(how)
    assert (done.returncode, result) == (code, {"ok": False, "kind": kind, "message": message})
    assert ("Traceback" in done.stderr) == (kind != "user")


def test_a_worker_that_waits_imports_first_and_ends_without_a_result_when_it_is_not_needed(work):
    done, result = work("well", "--wait")
    assert (done.returncode, done.stdout, result) == (0, "imported\n", None)
    done, result = work("well", "--wait", stdin="go\n")
    assert (done.returncode, result["data"]) == (0, {"got": "well"})


def test_other_arguments_are_refused(work):
    done, result = work("well", "--now")
    assert done.returncode == 1
    assert "usage: worker.py JOB.json RESULT.json [--wait]" in done.stderr
    assert result is None
