"""A clean copy of the code, without outputs, in which a recorded variant is rebuilt."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError, WorkerError
from quantline.core.files import sha256_of
from quantline.pipeline.code import source_file
from quantline.pipeline.compose import write_frozen
from quantline.pipeline.config import parse, with_current_names
from quantline.pipeline.identity import backends_of, locks_of
from quantline.pipeline.paths import stage_paths
from quantline.toolchains.environments import (
    HEALTH_CHECKS,
    PLATFORMS,
    detect_platform,
    environment_folder,
    environment_state,
    lock_file,
)

_PARTS = ("assets", "conf", "envs", "src", "stages", "dvc.yaml", "params.yaml", "pyproject.toml")
_DROPPED = ("DVC_", "MLFLOW_", "PYTHON", "HYDRA_")


@dataclass(frozen=True)
class Worktree:
    """A copy of the code. `origin` says which code it is."""

    root: Path
    origin: str

    def freeze(self, name: str, config: Mapping[str, Any]) -> None:
        """Write a variant's recorded configuration as `compose` freezes it.

        Raises:
            UserError: the recorded locks differ from those of the local environments.
        """
        values = {key: value for key, value in config.items() if key != "frozen"}
        # A frozen configuration records its backends, so an older one need not parse with today's option names.
        frozen = dict(config.get("frozen") or {})
        if not frozen:
            frozen = {"overrides": "", "backends": backends_of(parse(with_current_names(values)))}
        locks = locks_of(frozen["backends"], self.root)
        for role, lock in (frozen.get("locks") or {}).items():
            if locks.get(role) != lock:
                raise UserError(
                    f"the {role}'s environment had another lock file ({lock[:12]}, {self.origin} has "
                    f"{str(locks.get(role))[:12]}): other packages can give other weights; check out the run's commit"
                )
        values["frozen"] = {**frozen, "variant": name, "locks": locks}
        write_frozen(self.root, name, values)

    def run(self, stage: str, name: str) -> None:
        """Run a stage of a frozen variant; its output is shown.

        Raises:
            WorkerError: it failed.
        """
        variables = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
        command = [sys.executable, "-m", f"stages.{stage}", "-cp", "../variants", "-cn", name]
        done = subprocess.run(command, cwd=self.root, env=variables, stdin=subprocess.DEVNULL, check=False)
        if done.returncode < 0 or done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise WorkerError(f"{stage} of {name} failed during the rebuild (exit code {done.returncode}), see above")

    def output(self, stage: str, name: str) -> Path:
        """The folder of a stage's output."""
        return stage_paths(self.root / "artifacts", name, stage).output


def make_worktree(
    folder: Path,
    root: Path,
    *,
    commit: str | None,
    patch: str | None,
    code: Mapping[str, Any],
    trust_patch: bool = False,
) -> Worktree:
    """Put the code that made a variant into `folder`: its commit if this repository has it, else the checked out files.

    Args:
        folder: the folder to make.
        root: the checkout.
        commit, patch: those of the run.
        code: stage -> source file -> SHA-256, from the run's results.
        trust_patch: apply the patch, which is code from the tracking server.

    Raises:
        UserError: none of these matches the recorded code; the message names the first file that differs.
    """

    def patched() -> str | None:
        return _patched(folder, root, commit, patch, trust_patch)

    ways: dict[str, Callable[[], str | None]] = {f"commit {commit}": lambda: _from_commit(folder, root, commit)}
    if patch is not None:
        ways[f"commit {commit} and the patch of the run"] = patched
    ways["the checkout"] = lambda: _from_checkout(folder, root)
    reasons = []
    for origin, fill in ways.items():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fault = fill() or _other_code(folder, code)
        if fault is None:
            _link_environments(folder, root)
            return Worktree(folder, origin)
        reasons.append(f"{origin}: {fault}")
    shutil.rmtree(folder, ignore_errors=True)
    raise UserError(
        "the code that made it was not found, and other code may give other weights:\n  " + "\n  ".join(reasons)
    )


def _from_commit(folder: Path, root: Path, commit: str | None) -> str | None:
    if not commit or not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        return "the run has no commit"
    archive = subprocess.run(["git", "-C", str(root), "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        return "this repository does not have it; fetch it (git fetch)"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter=_inside)  # noqa: S202 - a filter of tarfile's own, see there
    return None


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """A file of a commit as it may be unpacked; a link that leads out, such as to an environment, is left out."""
    try:
        return tarfile.data_filter(member, folder)
    except tarfile.FilterError:
        return None


def _patched(folder: Path, root: Path, commit: str | None, patch: str | None, trusted: bool) -> str | None:
    files = ", ".join(dict.fromkeys(re.findall(r"^\+\+\+ b/(.+)$", patch or "", re.MULTILINE)))
    if not trusted:
        return f"not applied, since it is code from the tracking server ({files}); if you trust it, give patch=apply"
    fault = _from_commit(folder, root, commit)
    if fault is not None:
        return fault
    limits = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    applied = subprocess.run(command, cwd=folder, env=limits, input=patch, capture_output=True, text=True, check=False)
    return f"the patch does not apply ({applied.stderr.strip()})" if applied.returncode else None


def _from_checkout(folder: Path, root: Path) -> str | None:
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in _PARTS:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.is_file():
            shutil.copyfile(source, folder / name)
    return None


def _other_code(folder: Path, code: Mapping[str, Any]) -> str | None:
    """The first recorded source file that is missing or differs here.

    A file that was not recorded can influence a stage only if a recorded file imports it, and then that file differs.
    """
    for stage, recorded in code.items():
        for name, digest in sorted(recorded.items()):
            path = source_file(name, folder)
            if not path.is_file():
                return f"{name}, which {stage} uses, is missing"
            if sha256_of(path) != digest:
                return f"{name}, which {stage} uses, differs"
    return None


def _link_environments(folder: Path, root: Path) -> None:
    """Link the environments that were built here from the same lock files; others are built when needed."""
    (folder / ".venvs").mkdir()
    for name, platform in product(HEALTH_CHECKS, PLATFORMS):
        built, lock = environment_folder(root, name, platform), lock_file(folder, name, platform)
        if lock.is_file() and environment_state(built) == sha256_of(lock):
            environment_folder(folder, name, platform).symlink_to(built.resolve())
            if platform == detect_platform():  # where the code of older commits looks
                (folder / ".venvs" / name).symlink_to(built.resolve())


def baseline_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the float baseline of a variant."""
    values = {key: value for key, value in config.items() if key != "frozen"}
    return {**values, "variant": None, "method": {"name": BASELINE}, "backend": "auto"}
