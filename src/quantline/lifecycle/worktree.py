"""A clean copy of the code in which a recorded variant is made again, with no output of anybody's in it."""

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
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError, WorkerError
from quantline.core.files import sha256_of
from quantline.pipeline.compose import write_frozen
from quantline.pipeline.config import parse, with_current_names
from quantline.pipeline.identity import backends_of, locks_of
from quantline.pipeline.paths import stage_paths
from quantline.toolchains.environments import HEALTH_CHECKS, PLATFORMS, environment_state, lock_file

_PARTS = ("assets", "conf", "envs", "src", "stages", "dvc.yaml", "params.yaml", "pyproject.toml")
_DROPPED = ("DVC_", "MLFLOW_", "PYTHON", "HYDRA_")


@dataclass(frozen=True)
class Worktree:
    """A copy of the code. `origin` says of which."""

    root: Path
    origin: str

    def freeze(self, name: str, config: Mapping[str, Any]) -> None:
        """Write a variant's recorded configuration as `compose` freezes it.

        Raises:
            UserError: the recorded locks are not those of the environments here.
        """
        values = {key: value for key, value in config.items() if key != "frozen"}
        frozen = dict(config.get("frozen") or {})
        if not frozen:
            frozen = {"overrides": "", "backends": backends_of(parse(with_current_names(values)))}
        locks = locks_of(frozen["backends"], self.root)
        for role, lock in (frozen.get("locks") or {}).items():
            if locks.get(role) != lock:
                raise UserError(
                    f"the {role}'s environment was locked otherwise ({lock[:12]}, {self.origin} has "
                    f"{str(locks.get(role))[:12]}): other packages can give other weights; check the commit of the run out"
                )
        values["frozen"] = {**frozen, "variant": name, "locks": locks}
        write_frozen(self.root, name, values)

    def run(self, stage: str, name: str) -> None:
        """Run a stage of a frozen variant; what it says is passed on.

        Raises:
            WorkerError: it failed.
        """
        variables = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
        command = [sys.executable, "-m", f"stages.{stage}", "-cp", "../variants", "-cn", name]
        done = subprocess.run(command, cwd=self.root, env=variables, stdin=subprocess.DEVNULL, check=False)
        if done.returncode < 0 or done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise WorkerError(
                f"{stage} of {name} failed when it was made again (exit code {done.returncode}), see above"
            )

    def output(self, stage: str, name: str) -> Path:
        """Where a stage's output lies."""
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
    """Put the code that made a variant into `folder`: its commit where this repository has it, else what is checked out.

    Args:
        folder: to be made.
        root: the checkout.
        commit, patch: of the run.
        code: stage -> source file -> SHA-256, as the run's results tell.
        trust_patch: apply the patch, which is code that comes from the tracking server.

    Raises:
        UserError: neither is the code that made it; the message names the first file that differs.
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
        "the code that made it is not here, and other code may give other weights:\n  "
        + "\n  ".join(reasons)
        + "\nfetch the commit of the run into this repository (git fetch), or check it out"
    )


def _from_commit(folder: Path, root: Path, commit: str | None) -> str | None:
    if not commit or not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        return "the run names none"
    archive = subprocess.run(["git", "-C", str(root), "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        return "this repository does not have it"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    return None


def _patched(folder: Path, root: Path, commit: str | None, patch: str | None, trusted: bool) -> str | None:
    files = ", ".join(dict.fromkeys(re.findall(r"^\+\+\+ b/(.+)$", patch or "", re.MULTILINE)))
    if not trusted:
        return (
            f"not applied, it is code that comes from the tracking server ({files}); if you trust it, give patch=apply"
        )
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
    """The first recorded source file that is another one here.

    A file that was not recorded can have a part in a stage only where a recorded one imports it, and then that one differs.
    """
    for stage, recorded in code.items():
        for name, digest in sorted(recorded.items()):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing, which {stage} runs"
            if sha256_of(path) != digest:
                return f"{name} differs, which {stage} runs"
    return None


def _link_environments(folder: Path, root: Path) -> None:
    """Share the environments that are built here from the same locks; another lock gets an environment of its own."""
    (folder / ".venvs").mkdir()
    for name in HEALTH_CHECKS:
        built = environment_state(root / ".venvs" / name)
        locks = [lock_file(folder, name, platform) for platform in PLATFORMS]
        if built is not None and built in [sha256_of(lock) for lock in locks if lock.is_file()]:
            (folder / ".venvs" / name).symlink_to((root / ".venvs" / name).resolve())


def baseline_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the float baseline that goes with a variant's."""
    values = {key: value for key, value in config.items() if key != "frozen"}
    return {**values, "variant": None, "method": {"name": BASELINE}, "backend": "auto"}
