"""A sweep on disk: what it builds, a copy of the project as it was at the start, and a record of every job.

    scratch/sweep/<id>/sweep.json     what was asked for
    scratch/sweep/<id>/project/       the project as it was at the start, with dvc.lock
    scratch/sweep/<id>/jobs/<v>.json  a job's record; the job writes it
    scratch/sweep/<id>/logs/<v>.log   what the job printed
    scratch/sweep/<id>/areas/<v>/     where a job works; removed when it has ended

<v> is the variant; of several models MODEL-NAME.

All jobs of a sweep see this folder. A record is written whole, so that a killed job leaves its last one.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import alive, read_json, write_json
from quantline.pipeline.names import file_name

HOME = Path("scratch", "sweep")
_ID = re.compile(r"\d{8}-\d{6}-\d+")


@dataclass(frozen=True)
class Sweep:
    """What was asked for.

    home: its folder, absolute. root: the checkout that started it. variants: one job each. launcher: what starts the jobs.
    workers: jobs at the same time. gpus: GPUs that a job leases on its machine. remote: the DVC remote over which machines
    without a common file system share results; None where they share DVC's cache. cache: folder of DVC's cache.
    settings: options of the launcher, NAME=VALUE. until: the last stage that is run; None for all.
    """

    home: Path
    root: Path
    variants: tuple[str, ...]
    launcher: str
    workers: int
    gpus: int
    remote: str | None
    cache: Path
    settings: tuple[str, ...] = ()
    until: str | None = None

    @property
    def project(self) -> Path:
        """The copy of the project that all jobs start from."""
        return self.home / "project"

    def log(self, variant: str) -> Path:
        """What the job of a variant printed."""
        return self.home / "logs" / f"{file_name(variant)}.log"


@dataclass(frozen=True)
class JobRecord:
    """One job. state: waiting, running, done or failed. seconds: wall time of its last attempt. fault: why it failed.

    host, pid: of the process that ran it. gpus: the leased ones. again: stages that ran, not taken from the cache.
    """

    variant: str
    state: str = "waiting"
    host: str = ""
    pid: int = 0
    gpus: tuple[str, ...] = ()
    attempt: int = 0
    started: float = 0.0
    seconds: float = 0.0
    again: tuple[str, ...] = ()
    fault: str = ""


def new_home(root: Path) -> Path:
    """A new folder for a sweep, named by the time and the process."""
    home = root.resolve() / HOME / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for part in ("jobs", "logs", "areas"):
        (home / part).mkdir(parents=True)
    return home


def write_sweep(sweep: Sweep) -> None:
    """Write what was asked for, and a waiting record of every job."""
    plain = {**asdict(sweep), **{name: str(getattr(sweep, name)) for name in ("home", "root", "cache")}}
    write_json(sweep.home / "sweep.json", plain)
    for variant in sweep.variants:
        write_job(sweep, JobRecord(variant))


def read_sweep(home: Path) -> Sweep:
    """A sweep by its folder.

    Raises:
        UserError: it holds no sweep.
    """
    place = home / "sweep.json"
    if not place.is_file():
        raise UserError(f"sweep={home}: holds no sweep; `python -m stages.sweep list` names those that there are")
    content: dict[str, Any] = read_json(place)
    content.update({name: Path(content[name]) for name in ("home", "root", "cache")})
    content.update({name: tuple(content[name]) for name in ("variants", "settings")})
    return Sweep(**content)


def sweeps(root: Path) -> list[Path]:
    """The folders of the sweeps of a checkout, the oldest first."""
    return sorted(path for path in (root / HOME).glob("*") if _ID.fullmatch(path.name) and path.is_dir())


def write_job(sweep: Sweep, record: JobRecord) -> None:
    """Write a job's record."""
    write_json(sweep.home / "jobs" / f"{file_name(record.variant)}.json", asdict(record))


def read_job(sweep: Sweep, variant: str) -> JobRecord:
    """A job's record. A job that says that it runs here, but whose process is gone, has failed."""
    content = read_json(sweep.home / "jobs" / f"{file_name(variant)}.json")
    record = JobRecord(**{**content, "gpus": tuple(content["gpus"]), "again": tuple(content["again"])})
    if record.state == "running" and record.host == socket.gethostname() and not alive(record.pid):
        return replace(record, state="failed", fault="its process was killed")
    return record


def read_jobs(sweep: Sweep, variants: Sequence[str] | None = None) -> list[JobRecord]:
    """The records of all jobs, in the order of the variants."""
    return [read_job(sweep, variant) for variant in variants or sweep.variants]
