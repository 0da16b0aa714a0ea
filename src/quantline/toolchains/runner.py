"""Runs jobs in workers, and starts workers early: they import their libraries while another worker computes.

A waiting worker holds no model, only torch and transformers: some 350 MB. If it gets no job, it ends with the block.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantline.core.errors import DiskFullError, UserError, WorkerError
from quantline.core.files import write_json
from quantline.core.progress import bar
from quantline.toolchains.protocol import PROGRESS_PREFIX, WAIT, JobResult
from quantline.toolchains.toolchain import Toolchain, worker_environment

Ask = Callable[[Mapping[str, Any], str], JobResult]


@contextmanager
def early_worker(
    toolchain: Toolchain,
    module: str,
    *,
    log: Path,
    threads: int,
    extra_environment: Mapping[str, str] | None = None,
) -> Iterator[Ask]:
    """Start `python -m module --wait` and yield a function that sends it one job and returns the result.

    Args:
        toolchain, module, log, threads, extra_environment: as in `run_worker`. The yielded function raises the same errors.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantline-job-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        command = [str(toolchain.python), "-m", module, str(job_path), str(result_path), WAIT]
        variables = worker_environment(threads, extra_environment)
        process = start_logged(command, variables, stdin=subprocess.PIPE)

        def ask(job: Mapping[str, Any], label: str) -> JobResult:
            write_json(job_path, dict(job))
            _send_go(process)
            code, step = follow(process, log, label)
            return read_job_result(result_path, code, log, f"{module.rsplit('.', 1)[-1]} worker", step)

        try:
            yield ask
        finally:
            if process.poll() is None:
                end_group(process)


def _send_go(process: Process) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("go\n")
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has exited: its log and exit code tell why


Process = subprocess.Popen[str]


def run_worker(
    toolchain: Toolchain,
    module: str,
    job: Mapping[str, Any],
    *,
    log: Path,
    threads: int,
    label: str,
    extra_environment: Mapping[str, str] | None = None,
) -> JobResult:
    """Run `python -m module` on `job` in the toolchain's interpreter and return its result.

    log: the file for everything that the worker prints. The worker runs in its own process group, which ends with the
    parent, even if that is killed.

    Raises:
        UserError: the worker refused the job, or the disk is full.
        WorkerError: it crashed, was killed, or left no valid result.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantline-job-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        write_json(job_path, dict(job))
        command = [str(toolchain.python), "-m", module, str(job_path), str(result_path)]
        process = start_logged(command, worker_environment(threads, extra_environment))
        code, step = follow(process, log, label)
        return read_job_result(result_path, code, log, f"{module.rsplit('.', 1)[-1]} worker", step)


def start_logged(command: list[str], variables: Mapping[str, str], stdin: int = subprocess.DEVNULL) -> Process:
    """Start a worker in its own process group, for `follow`."""
    return subprocess.Popen(
        command, env=variables, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def follow(process: Process, log: Path, label: str) -> tuple[int, str]:
    """Wait for a worker to end; return its exit code and last reported step, as ` at 14/35 layer 3 mlp.up_proj`."""
    last, started = "", time.monotonic()
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as sink, bar(label) as progress:
            for line in process.stdout:
                if line.startswith(PROGRESS_PREFIX):
                    step = json.loads(line[len(PROGRESS_PREFIX) :])
                    progress.update(step["done"], step["total"], step["label"])
                    last = f" at {step['done']:g}/{step['total']:g} {step['label']}".rstrip()
                    # Steps and their times are logged too, so that the log of a crashed run shows how far it got.
                    sink.write(f"[{time.monotonic() - started:.1f} s]{last}\n")
                    sink.flush()
                else:
                    sink.write(line)
                    sink.flush()
        return process.wait(), last
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[Any], grace: float = 5.0) -> None:
    """End a process started with `start_new_session` and its children: by SIGTERM, then by SIGKILL."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read_job_result(path: Path, code: int, log: Path, who: str, step: str = "") -> JobResult:
    """Read the result file of a worker that exited with `code`; raises the errors of `run_worker`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = None
    if result is None:
        ending = f"was killed by signal {-code}" if code < 0 else f"exited with code {code} and without a result"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        raise WorkerError(f"the {who} {ending}{hint}{step}; its log is {log}\n{_tail(log)}")
    if not result["ok"]:
        if result["kind"] == "user":
            raise UserError(str(result["message"]))
        if result["kind"] == "disk":
            raise DiskFullError(f"the disk is full; free some space and run the stage again (log of the {who}: {log})")
        raise WorkerError(f"the {who} failed{step}: {result['message']}; its log is {log}")
    if code != 0:
        raise WorkerError(f"the {who} wrote a result but exited with code {code}; its log is {log}")
    return JobResult(result["data"], result["seconds"], result["peak_memory_bytes"], result["versions"])


def _tail(log: Path, lines: int = 8) -> str:
    try:
        return "\n".join(f"  | {line}" for line in log.read_text(encoding="utf-8").splitlines()[-lines:])
    except OSError:
        return ""
