"""One job of a sweep: `dvc repro` of one variant's stages in a private work area, with what it needs of the machine leased.

Everything that a finished stage made is in DVC's cache and run cache, so a job that was killed loses the stage that it was
in and nothing else. Failures are recorded, never raised: one failed job must not end the others.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from quantline.core.errors import QuantlineError
from quantline.core.gpu import visible_gpus
from quantline.lifecycle.storage.dvc_lock import stage_keys
from quantline.lifecycle.sweep.area import make_area, remove_area
from quantline.lifecycle.sweep.launch import GIVES_GPUS
from quantline.lifecycle.sweep.leases import gpus_of, leased, quiet
from quantline.lifecycle.sweep.record import HOME, JobRecord, Sweep, read_job, write_job
from quantline.pipeline.names import file_name
from quantline.pipeline.stages import PIPELINE
from quantline.serving import process_tree

# Measured beside the float model in one session; other work on the same processors would be measured, too.
TIMED = "speed"
_GRACE_SECONDS = 60.0
_RUNNING = re.compile(r"(?m)^Running stage '([^']+)'")
# These write one small file in a second; `inputs` and `report` have no result that could be cached.
LIGHT = re.compile(r"(code|compose|compose_baseline|inputs|report|overview)(@|$)")


def ran(output: str) -> tuple[str, ...]:
    """The stages that DVC ran by what it printed, without those that take a second and those that always run."""
    return tuple(name for name in _RUNNING.findall(output) if not LIGHT.match(name))


def targets(variant: str, until: str | None) -> list[str]:
    """The stages of a variant up to one of them, as DVC names them."""
    allowed = PIPELINE if until is None else PIPELINE[: PIPELINE.index(until) + 1]
    return [key for stage, key in stage_keys(variant).items() if stage in allowed]


def run_job(sweep: Sweep, variant: str) -> JobRecord:
    """Run a job and write its record, which is returned. Two jobs of one variant, of any sweeps, wait for each other."""
    last = read_job(sweep, variant)
    record = JobRecord(
        variant, "running", socket.gethostname(), os.getpid(), attempt=last.attempt + 1, started=time.time()
    )
    fault = ""
    try:
        with ExitStack() as held:
            slots = [str(number) for number in range(sweep.workers)]
            held.enter_context(leased(1, slots, f"slot-{sweep.home.name}"))
            held.enter_context(_alone(sweep, variant))
            gpus = tuple(_gpus()) if sweep.gpus else ()
            if sweep.launcher not in GIVES_GPUS:
                gpus = held.enter_context(leased(sweep.gpus, gpus, "gpu"))
            record = replace(record, gpus=gpus)
            write_job(sweep, record)
            fault = _build(sweep, variant, gpus)
    except (QuantlineError, OSError) as error:
        fault = str(error)
    record = replace(
        record, state="failed" if fault else "done", seconds=round(time.time() - record.started, 1), fault=fault,
        again=tuple(dict.fromkeys((*last.again, *ran(_text(sweep.log(variant)))))),
    )  # fmt: skip
    write_job(sweep, record)
    return record


def _gpus() -> list[str]:
    return gpus_of(dict(os.environ), [str(number) for number in range(len(visible_gpus()))])


@contextmanager
def _alone(sweep: Sweep, variant: str) -> Iterator[None]:
    locks = sweep.home.parent / "locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{file_name(variant)}.lock"):
        yield


def _build(sweep: Sweep, variant: str, gpus: Sequence[str]) -> str:
    """Run the stages of a variant; return why that failed."""
    area = make_area(sweep, variant)
    with sweep.log(variant).open("w", encoding="utf-8") as log:
        if sweep.remote is not None:
            # What no job has made yet is not there, and makes DVC's pull fail: repro runs it then.
            _dvc(area, ["pull", "--run-cache", "--allow-missing", "--remote", sweep.remote], log.fileno(), gpus)
        wanted = targets(variant, sweep.until)
        timed = [name for name in wanted if name.partition("@")[0] == TIMED]
        rest = [name for name in wanted if name not in timed]
        for names, alone in ((rest, False), (timed, True)):
            with quiet(alone=alone and not gpus):
                code = _dvc(area, ["repro", *names], log.fileno(), gpus) if names else 0
            if code:
                return f"`dvc repro` failed (exit code {code}); log: {sweep.log(variant)}"
        if sweep.remote is not None and _dvc(
            area, ["push", "--run-cache", "--remote", sweep.remote], log.fileno(), gpus
        ):
            return f"the results could not be pushed to {sweep.remote}; log: {sweep.log(variant)}"
    remove_area(area)
    return ""


def _dvc(area: Path, arguments: Sequence[str], log: int, gpus: Sequence[str]) -> int:
    """Run DVC in a work area; its processes end with this one, even if that is killed."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "HYDRA_", "PYTHON"))}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    variables["DVC_NO_ANALYTICS"] = "1"
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    supervisor = [sys.executable, "-I", "-S", str(process_tree.__file__), str(_GRACE_SECONDS)]
    command = [*supervisor, sys.executable, "-m", "dvc", *arguments]
    with subprocess.Popen(
        command, cwd=area, env=variables, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"!")  # it may clean up when it is ended
        process.stdin.flush()
        return process.wait()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def remove_leftovers(root: Path) -> list[Path]:
    """Remove the work areas of jobs that were killed, in all sweeps of a checkout; return them."""
    removed = []
    for area in sorted((root / HOME).glob("*/areas/*")):
        lock = FileLock(root / HOME / "locks" / f"{area.name}.lock", timeout=0)
        try:
            with lock:
                remove_area(area)
                removed.append(area)
        except OSError:  # filelock's Timeout is one: a job works there
            continue
    return removed
