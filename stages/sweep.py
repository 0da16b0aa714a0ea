"""Build several variants at the same time, here or on other machines.

What all variants share runs first, once. Then every variant is a job of its own: `dvc repro` in a private work area that
shares DVC's cache, or a remote. At last `dvc repro` in this checkout takes everything from the cache; it must run nothing.
See docs/guide/sweep.md.

Examples:
    python -m stages.sweep workers=2
    python -m stages.sweep launcher=slurm detach=true gpus=1
    python -m stages.sweep collect
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, command

if TYPE_CHECKING:
    from quantline.lifecycle.sweep.record import Sweep

OPTIONS = [
    Option("do", "run", "run all; collect the results of a sweep that ran detached; list the sweeps; job runs one job",
           allowed=("run", "collect", "list", "job"), bare=True),
    Option("variants", "A,B", "variants of params.yaml; default all"),
    Option("until", "STAGE", "the last stage; default all",
           allowed=("all", "download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks", "speed")),
    Option("launcher", "local", "what starts the jobs",  # spelled out: completion reads it without importing this module
           allowed=("local", "joblib", "submitit", "slurm", "ray")),
    Option("workers", "N", "jobs at the same time; default one for every four cores, or for the GPUs that there are"),
    Option("gpus", "N", "GPUs of a job, leased on its machine", "0"),
    Option("retries", "N", "how often a failed job is started again", "1"),
    Option("remote", "NAME", "the DVC remote over which machines without a common file system share results"),
    Option("settings", '"A=B C=D"', "options of the launcher, as hydra.launcher or sbatch has them"),
    Option("detach", "true", "launcher=slurm: hand over one array and end; `collect` takes the results later",
           allowed=("false", "true")),
    Option("python", "PATH", "an interpreter with Hydra's launchers; default the environment of envs/sweep-cpu.txt"),
    Option("sweep", "DIR", "the folder of a sweep, for collect; default the last one"),
    Option("of", "NAME", "the variant of a job"),
]  # fmt: skip


def sweep(arguments: dict[str, str | None]) -> int:
    from quantline.core.errors import UserError
    from quantline.lifecycle.sweep import record
    from quantline.lifecycle.sweep.job import run_job
    from quantline.lifecycle.sweep.launch import require_launcher, submit_array
    from quantline.lifecycle.sweep.run import Asked, prepare, render, run_jobs

    doing = arguments["do"]
    homes = record.sweeps(ROOT)
    if doing == "list":
        for home in homes:
            one = record.read_sweep(home)
            states = [job.state for job in record.read_jobs(one)]
            counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            print(f"{home.relative_to(ROOT)}  {one.launcher}  {counted}")
        return 0
    if doing == "job":
        return int(run_job(record.read_sweep(Path(str(arguments["sweep"]))), str(arguments["of"])).state != "done")
    if doing == "collect":
        if arguments["sweep"] is None and not homes:
            raise UserError("no sweep ran in this checkout; `python -m stages.sweep` runs one")
        chosen = ROOT / arguments["sweep"] if arguments["sweep"] else homes[-1]
        return _end(record.read_sweep(chosen))
    if arguments["detach"] == "true" and arguments["launcher"] != "slurm":
        raise UserError(f"detach=true launcher={arguments['launcher']}: only Slurm runs on without this terminal")
    variants = tuple(name for name in (arguments["variants"] or "").split(",") if name)
    if arguments["variants"] and not variants:
        raise UserError(f"variants={arguments['variants']}: names no variant; leave it out for all")
    asked = Asked(
        variants=variants or None,
        launcher=str(arguments["launcher"]),
        workers=_number(arguments, "workers", 1), gpus=_number(arguments, "gpus", 0) or 0,
        remote=arguments["remote"], settings=tuple((arguments["settings"] or "").split()),
        retries=_number(arguments, "retries", 0) or 0, python=arguments["python"],
        until=None if arguments["until"] == "all" else arguments["until"],
    )  # fmt: skip
    require_launcher(asked.launcher, detach=arguments["detach"] == "true")
    made = prepare(ROOT, asked)
    print(f"{len(made.variants)} jobs, {made.workers} at a time, launcher {made.launcher} -> "
          f"{made.home.relative_to(ROOT.resolve())}", file=sys.stderr, flush=True)  # fmt: skip
    if arguments["detach"] == "true":
        number = submit_array(made)
        print(f"Slurm's job {number}; when it has ended: python -m stages.sweep collect sweep={made.home}")
        return 0
    try:
        run_jobs(made, asked)
    except KeyboardInterrupt:
        print(render(record.read_jobs(made)))
        raise
    return _end(made)


def _end(made: Sweep) -> int:
    from quantline.lifecycle.sweep.run import collect, render

    collected = collect(made)
    print(render(collected.jobs))
    if collected.again:
        print(f"`dvc repro` here ran again: {', '.join(collected.again)}", file=sys.stderr)
    elif any(job.state == "done" for job in collected.jobs):
        print("`dvc repro` here had nothing to run", file=sys.stderr)
    else:
        print(
            "no job ended well, so there is nothing to bring home; mend the fault and run the sweep again",
            file=sys.stderr,
        )
    return 0 if collected.whole else 1


def _number(arguments: dict[str, str | None], name: str, least: int) -> int | None:
    from quantline.core.errors import UserError

    value = arguments[name]
    if value is None:
        return None
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name}={value}: give a whole number of at least {least}")
    return int(value)


if __name__ == "__main__":
    command(sweep, OPTIONS, __doc__)
