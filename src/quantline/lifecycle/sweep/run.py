"""Builds variants at the same time: what all share first, then a job a variant, then the proof.

The proof is `dvc repro` in the checkout: it must run nothing, since it takes everything from the cache that the jobs
filled. So a sweep gives what `dvc repro` alone gives, or says what it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantline.core.errors import QuantlineError, UserError, WorkerError
from quantline.core.gpu import visible_gpus
from quantline.core.text import nearest
from quantline.lifecycle.storage.dvc_cache import require_remote
from quantline.lifecycle.sweep.area import copy_project
from quantline.lifecycle.sweep.job import ran, remove_leftovers, targets
from quantline.lifecycle.sweep.launch import launcher_log, log_tail, start, workers_for
from quantline.lifecycle.sweep.record import JobRecord, Sweep, new_home, read_jobs, write_job, write_sweep
from quantline.pipeline.compose import read_params
from quantline.pipeline.dvc_config import cache_folder, dvc_config
from quantline.pipeline.names import baseline_of, dvc_stage, is_baseline_name


@dataclass(frozen=True)
class Asked:
    """What a user asks of a sweep; see `Sweep`. variants: None for all of params.yaml. workers: None chooses."""

    variants: tuple[str, ...] | None = None
    launcher: str = "local"
    workers: int | None = None
    gpus: int = 0
    remote: str | None = None
    settings: tuple[str, ...] = ()
    retries: int = 1
    python: str | None = None
    until: str | None = None


def prepare(root: Path, asked: Asked) -> Sweep:
    """Run what all variants share in the checkout, once, and write down the sweep.

    Raises:
        UserError: no such variant or remote, or a line of params.yaml is wrong.
        WorkerError: a shared stage failed.
    """
    known = [name for name in read_params(root / "params.yaml")["variants"] if not is_baseline_name(name)]
    for name in asked.variants or ():
        if name not in known:
            raise UserError(
                f"variants={name}: no such variant{nearest(name, known)}; params.yaml has {', '.join(known)}"
            )
    variants = asked.variants or tuple(known)
    if asked.remote is not None:
        require_remote(dvc_config(root), asked.remote)
    _run(root, [sys.executable, "-m", "stages.check"])
    for area in remove_leftovers(root):
        print(f"removed what a killed job left: {area.relative_to(root)}", file=sys.stderr)
    composed = [dvc_stage("compose", name) for name in known]
    baselines = dict.fromkeys(baseline_of(name) for name in variants)
    shared = ["code", "inputs", *composed, *(key for name in baselines for key in targets(name, asked.until))]
    repro(root, shared)
    if asked.remote is not None:
        _run(root, [sys.executable, "-m", "dvc", "push", "--run-cache", "--remote", asked.remote])
    workers = min(workers_for(asked.workers, asked.gpus, len(visible_gpus())), len(variants))
    home = new_home(root)
    sweep = Sweep(
        home, root.resolve(), variants, asked.launcher, workers, asked.gpus, asked.remote,
        cache_folder(root).resolve(), asked.settings, asked.until,
    )  # fmt: skip
    copy_project(root, sweep.project)
    write_sweep(sweep)
    return sweep


def run_jobs(sweep: Sweep, asked: Asked) -> list[JobRecord]:
    """Run all jobs, those that failed once more where asked, on another machine where the launcher has one.

    Raises:
        UserError: the launcher does not know one of the settings, or is not installed.
        WorkerError: the launcher failed.
    """
    left = list(sweep.variants)
    for attempt in range(asked.retries + 1):
        hosts = sorted({job.host for job in read_jobs(sweep, left) if job.host}) if attempt else []
        try:
            start(sweep, left, python=asked.python, hosts=hosts)
        except QuantlineError as error:
            _end_waiting(sweep, left, str(error))
            raise
        _end_waiting(sweep, left, f"it ended before it began; log: {launcher_log(sweep)}")
        left = [job.variant for job in read_jobs(sweep, left) if job.state != "done"]
        if not left:
            break
        if attempt < asked.retries:
            print(f"again: {', '.join(left)}", file=sys.stderr, flush=True)
    return read_jobs(sweep)


def _end_waiting(sweep: Sweep, variants: Sequence[str], fault: str) -> None:
    """Note that jobs failed that no launcher begins any more."""
    for job in read_jobs(sweep, variants):
        if job.state == "waiting":
            write_job(sweep, replace(job, state="failed", fault=fault))


@dataclass(frozen=True)
class Collected:
    """jobs: all records. again: stages that `dvc repro` in the checkout had to run; none is the proof."""

    jobs: list[JobRecord]
    again: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every job ended well and the checkout had nothing left to run."""
        return not self.again and all(job.state == "done" for job in self.jobs)


def collect(sweep: Sweep) -> Collected:
    """Bring the results of all finished jobs into the checkout, the report too where no job failed.

    Raises:
        UserError: jobs are still waiting or running, or the checkout is another one by now.
        WorkerError: `dvc repro` failed.
    """
    jobs = read_jobs(sweep)
    open_ones = [job.variant for job in jobs if job.state in ("waiting", "running")]
    if open_ones:
        raise UserError(f"{', '.join(open_ones)}: not ended yet; collect when they are, or run the sweep again")
    changed = [name for name in ("params.yaml", "dvc.yaml") if _differs(sweep.root / name, sweep.project / name)]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since the sweep started, and what is there now was not built; run the sweep "
            "again, which takes from the cache what is the same"
        )
    if sweep.remote is not None:
        _run(sweep.root, [sys.executable, "-m", "dvc", "fetch", "--run-cache", "--remote", sweep.remote])
    done = [job.variant for job in jobs if job.state == "done"]
    if not done:
        return Collected(jobs, ())
    # The whole pipeline where all variants of params.yaml are there, so that the report is made, too.
    known = [name for name in read_params(sweep.root / "params.yaml")["variants"] if not is_baseline_name(name)]
    everything = sweep.until is None and set(known) <= set(done)
    wanted = [] if everything else [key for name in done for key in targets(name, sweep.until)]
    again = repro(sweep.root, wanted, quiet=True)
    return Collected(jobs, again)


def repro(root: Path, names: Sequence[str], *, quiet: bool = False) -> tuple[str, ...]:
    """`dvc repro` in the checkout; return the stages that ran. quiet: show its output only where it fails.

    Raises:
        WorkerError: it failed.
    """
    log = root / "scratch" / "sweep" / ".repro.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", *names]
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=root, env=_variables(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process, log.open("w", encoding="utf-8") as file:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            if not quiet:
                print(line, end="", file=sys.stderr, flush=True)
    if process.returncode < 0 or process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise WorkerError(f"`dvc repro` failed in the checkout: {log_tail(log)}")
    return ran("".join(lines))


def _variables() -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HYDRA_")}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    return {**variables, "DVC_NO_ANALYTICS": "1"}


def _run(root: Path, command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=root, env=_variables(), stdin=subprocess.DEVNULL, check=False)
    if done.returncode < 0 or done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise WorkerError(f"`{' '.join(command[2:])}` failed (exit code {done.returncode}), see above")


def _differs(one: Path, other: Path) -> bool:
    return one.read_bytes() != other.read_bytes()


def render(jobs: Sequence[JobRecord]) -> str:
    """The table of what ran where.

    seconds are wall time with waiting for leases.
    """
    from tabulate import tabulate

    rows = [
        (job.variant, job.state, job.host, ",".join(job.gpus) or "-", job.attempt,
         f"{job.seconds:.0f}" if job.seconds else "-", len(job.again), job.fault.partition("\n")[0])
        for job in jobs
    ]  # fmt: skip
    return tabulate(rows, ["variant", "state", "machine", "GPUs", "attempts", "seconds", "stages run", "fault"])
