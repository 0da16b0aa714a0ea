"""Starts the jobs of a sweep: as processes of this machine, by one of Hydra's launchers, or as an array of Slurm's."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantline.core.errors import UserError, WorkerError
from quantline.core.files import write_json
from quantline.lifecycle.sweep.record import Sweep
from quantline.toolchains.environments import ensure
from quantline.toolchains.toolchain import worker_environment

TOOLCHAIN = "sweep"
# Hydra's launchers by the names that people know, with the option that says how many jobs run at the same time.
_HYDRA = {
    "joblib": ("joblib", "hydra.launcher.n_jobs"),
    "submitit": ("submitit_local", None),  # it starts all at once; the jobs wait for one another
    "slurm": ("submitit_slurm", "hydra.launcher.array_parallelism"),
    "ray": ("ray", "+hydra.launcher.ray.init.num_cpus"),
}
LAUNCHERS = ("local", *_HYDRA)
# These give each job GPUs of its own; with the others a job leases them on its machine.
GIVES_GPUS = ("slurm", "ray")
# Ray starts a dashboard and reports its use unless it is told not to, and asks for tokens of its own processes.
_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}


def command_of(sweep: Sweep, variant: str) -> list[str]:
    """The command of one job; it runs the code of the sweep's copy of the project."""
    return [sys.executable, "-m", "stages.sweep", "job", f"sweep={sweep.home}", f"of={variant}"]


def start(sweep: Sweep, variants: Sequence[str], *, python: str | None = None, hosts: Sequence[str] = ()) -> None:
    """Run jobs and wait for them. What becomes of each is in its record.

    python: an interpreter with Hydra's launchers, in place of the environment `sweep`. hosts: those that failed before,
    which Slurm leaves out.

    Raises:
        UserError: the launcher does not know one of the settings, or is not installed.
        WorkerError: the environment `sweep` could not be built, or the launcher failed.
    """
    if sweep.launcher == "local":
        _start_here(sweep, variants)
    else:
        _start_by_hydra(sweep, variants, python, hosts)


def launcher_log(sweep: Sweep) -> Path:
    """What launchers print, and jobs before they have a log of their own."""
    return sweep.home / "logs" / ".launcher.log"


def _start_here(sweep: Sweep, variants: Sequence[str]) -> None:
    def one(variant: str) -> None:
        with launcher_log(sweep).open("ab") as log:
            subprocess.run(command_of(sweep, variant), cwd=sweep.project, env=_variables(), stdin=subprocess.DEVNULL,
                           stdout=log, stderr=log, check=False)  # fmt: skip

    with ThreadPoolExecutor(sweep.workers) as pool:
        list(pool.map(one, variants))


def _variables() -> dict[str, str]:
    """A job's variables: its Python finds the code of the copy, not of this checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HYDRA_"))}


def _start_by_hydra(sweep: Sweep, variants: Sequence[str], python: str | None, hosts: Sequence[str]) -> None:
    toolchain = ensure(sweep.root, TOOLCHAIN, python=python, option="python")
    name, together = _HYDRA[sweep.launcher]
    spec = sweep.home / "launcher.json"
    commands = [command_of(sweep, variant) for variant in variants]
    write_json(spec, {
        "folder": str(sweep.project), "commands": commands, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gives_gpus": sweep.launcher in GIVES_GPUS,
    })  # fmt: skip
    own = [] if together is None else [f"{together}={sweep.workers}"]
    if sweep.gpus and sweep.launcher == "slurm":
        own.append(f"hydra.launcher.gpus_per_node={sweep.gpus}")
    if sweep.gpus and sweep.launcher == "ray":
        own.append(f"+hydra.launcher.ray.remote.num_gpus={sweep.gpus}")
    if hosts and sweep.launcher == "slurm":
        own.append(f"+hydra.launcher.additional_parameters.exclude='{','.join(hosts)}'")
    given = [f"hydra.launcher.{setting}" for setting in sweep.settings]
    command = [
        str(toolchain.python), "-m", "quantline.toolchains.launcher", "--multirun", f"hydra/launcher={name}", *own, *given,
        f"hydra.sweep.dir={sweep.home}/launcher", "hydra.sweep.subdir=${hydra.job.num}", "hydra.output_subdir=null",
        f"+spec={spec}", "+job=" + ",".join(str(number) for number in range(len(variants))),
    ]  # fmt: skip
    variables = worker_environment(1, _RAY)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        variables.pop(name, None)  # the jobs' workers set their own
    log = launcher_log(sweep)
    with log.open("ab") as file:
        done = subprocess.run(command, cwd=sweep.home, env=variables, stdin=subprocess.DEVNULL, stdout=file,
                              stderr=subprocess.STDOUT, check=False)  # fmt: skip
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise WorkerError(f"launcher={sweep.launcher} failed: {' | '.join(last)}; log: {log}")


def require_launcher(launcher: str, *, detach: bool) -> None:
    """Refuse a launcher whose programs are not installed, before anything is computed for its jobs.

    Raises:
        UserError: Slurm is asked for and its commands are not here.
    """
    lacking = [name for name in ("sbatch", "srun")[: 1 if detach else 2] if shutil.which(name) is None]
    if launcher == "slurm" and lacking:
        raise UserError(
            f"launcher=slurm: {lacking[0]} is not installed here; run this where Slurm's commands are, or give "
            "launcher=local"
        )


def submit_array(sweep: Sweep, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> str:
    """Hand the jobs to Slurm as one array, which lives on when this terminal is closed; return its job number.

    Raises:
        UserError: Slurm refuses; no sweep is left then, since nobody begins its jobs.
    """
    script = sweep.home / "array.sh"
    script.write_text(array_script(sweep), encoding="utf-8")
    done = run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(sweep.home)
        raise UserError(f"sbatch refused the array: {done.stderr.strip()}; correct settings=")
    return done.stdout.strip().partition(";")[0]


def array_script(sweep: Sweep) -> str:
    """The script of a Slurm array: one task a variant, `workers` of them at the same time."""
    options = [f"array=0-{len(sweep.variants) - 1}%{sweep.workers}", "job-name=quantline",
               f"output={sweep.home}/logs/.slurm-%a.log", *sweep.settings]  # fmt: skip
    if sweep.gpus:
        options.append(f"gpus-per-node={sweep.gpus}")
    commands = [shlex.join(command_of(sweep, variant)) for variant in sweep.variants]
    lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in options), f"cd {shlex.quote(str(sweep.project))}"]
    tasks = [f"  {number}) exec {command} ;;" for number, command in enumerate(commands)]
    return "\n".join([*lines, 'case "$SLURM_ARRAY_TASK_ID" in', *tasks, "esac", ""])


def workers_for(asked: int | None, gpus: int, found: int) -> int:
    """How many jobs run at the same time: as asked, else one a lease of GPUs, else one for every four cores."""
    if asked is not None:
        return asked
    if gpus:
        return max(1, found // gpus)
    return max(1, (os.cpu_count() or 1) // 4)


def log_tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log that say something."""
    if not log.is_file():
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
