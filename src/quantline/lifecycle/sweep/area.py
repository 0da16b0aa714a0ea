"""The private work area of a job: a copy of the project with DVC, which shares DVC's cache with the checkout.

DVC refuses two `dvc repro` in one workspace (3.67), so every job has one of its own. What a job makes is in the shared
cache and in its run cache, from where `dvc repro` in the checkout takes it.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from quantline.lifecycle.sweep.record import Sweep
from quantline.pipeline.dvc_config import cache_folder
from quantline.pipeline.names import file_name

# What a job reads of the project. All else in the checkout is linked, so that relative paths of models and texts hold.
_PARTS = ("conf", "envs", "src", "stages", "dvc.yaml", "params.yaml", "pyproject.toml", ".dvcignore", "dvc.lock")
_DVC = ("config", "config.local", "plots", ".gitignore")
# Outputs of the pipeline, and what is another checkout's own.
_OWN = (".git", ".dvc", "artifacts", "variants", "report", "metrics", "metrics.json", "fleet_smoke", "fleet_smoke.json",
        "code.yaml", "inputs.yaml", "scratch", "mlruns", "mlartifacts", "mlflow.db", "mlflow.db.lock", "site", "outputs",
        "multirun")  # fmt: skip
_IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def copy_project(root: Path, to: Path) -> None:
    """Copy the project as it is now: code, configuration and dvc.lock. What is large is linked.

    root: the checkout, or another copy. to: a folder that does not exist.
    """
    to.mkdir(parents=True)
    for name in _PARTS:
        _copy(root / name, to / name)
    for name in _DVC:
        _copy(root / ".dvc" / name, to / ".dvc" / name)
    hashes = Path("scratch", ".hashes.json")  # those of large files, which are then not read again
    _copy(root / hashes, to / hashes)
    for path in root.iterdir():
        if path.name not in _OWN and not (to / path.name).exists():
            (to / path.name).symlink_to(path.resolve())


def make_area(sweep: Sweep, variant: str) -> Path:
    """Make the work area of a job, anew where a killed job left one.

    Raises:
        UserError: DVC cannot read the project's configuration.
    """
    from dvc.config import Config

    area = sweep.home / "areas" / file_name(variant)
    remove_area(area)
    copy_project(sweep.project, area)
    with Config(str(area / ".dvc")).edit("local") as config:
        config["core"]["no_scm"] = True
        if sweep.remote is None:
            config["cache"]["dir"] = str(sweep.cache)
    assert sweep.remote is not None or cache_folder(area) == sweep.cache
    return area


def remove_area(area: Path) -> None:
    """Remove a work area; files that DVC made read-only, too."""
    with suppress(FileNotFoundError):
        shutil.rmtree(area)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=_IGNORED, symlinks=True)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
