"""Everything that a machine without a network needs, in one folder. tools/unbundle.py installs it there.

    DIR/repository.bundle           the repository, for `git clone`
    DIR/environments/<name>.tar     an installed environment: `core`, or the name of a folder of .venvs
    DIR/store/                      a DVC remote with the outputs and the run cache: models, token ids, results
    DIR/bundle.json                 names, sizes and SHA-256 of the above; written last

Installed environments are packed, not wheels: what arrives is what ran here, with the parts that no wheel holds (stand-ins,
vLLM's record), and PyTorch for CPUs needs no second index. They fit the same Python and the same processor architecture.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError, WorkerError
from quantline.core.files import building, sha256_of, write_json
from quantline.core.progress import bar
from quantline.pipeline.git import commit_of
from quantline.toolchains.environments import HEALTH_CHECKS, PLATFORMS, detect_platform, ensure

SCHEMA = 1
CORE = "core"
# Made anew on the other machine, with its own interpreter.
_OWN = {"pyvenv.cfg", "lib64", "include", "ready"}


@dataclass(frozen=True)
class Bundled:
    """A finished bundle. bytes: of all its files. environments: those that it holds."""

    folder: Path
    environments: tuple[str, ...]
    bytes: int


def environments_for(names: Sequence[str], on: str) -> list[str]:
    """The environments to pack, from what was asked for; `all` are those of every toolchain.

    Raises:
        UserError: there is no such environment or platform.
    """
    if on not in ("auto", *PLATFORMS):
        raise UserError(f"platform={on}: allowed are auto, {', '.join(PLATFORMS)}")
    if "all" in names:
        return list(HEALTH_CHECKS)
    for name in names:
        if name not in HEALTH_CHECKS:
            raise UserError(f"environments={name}: no such environment; there are all, {', '.join(HEALTH_CHECKS)}")
    return list(names)


def bundle(root: Path, to: Path, names: Sequence[str], *, on: str = "auto", outputs: bool = True) -> Bundled:
    """Pack the repository, the core's environment and those named, and DVC's outputs.

    Args:
        root: the checkout, which is committed and has the core's environment in .venv.
        to: a new or empty folder.
        names: environments as keys of `HEALTH_CHECKS`, or `all`; what is not built yet is built.
        on: the platform of the other machine: cpu, cuda, or auto for this one's.
        outputs: also DVC's outputs and run cache, so that nothing is downloaded or computed there that was here.

    Raises:
        UserError: `to` holds something, the checkout has changes that are not committed, or has no .venv.
        WorkerError: an environment could not be built, or git or DVC failed.
        DiskFullError: the disk is full.
    """
    chosen = environments_for(names, on)
    if to.exists() and any(to.iterdir()):
        raise UserError(f"to={to}: is not empty; give a new folder")
    commit, dirty = commit_of(root)
    if commit is None or dirty:
        fact = "has changes that are not committed" if commit else "has no commit"
        raise UserError(f"{root}: {fact}, and a bundle holds commits; commit them")
    if not (root / ".venv" / "ready").is_file():
        raise UserError(f"{root}/.venv: is missing or half built; run `make setup`")
    kind = detect_platform() if on == "auto" else on
    with building(to) as made:
        (made / "environments").mkdir(parents=True)
        _call(
            root,
            ["git", "bundle", "create", "--quiet", str(made.resolve() / "repository.bundle"), "HEAD", "--branches"],
        )
        packed = {CORE: root / ".venv"}
        for name in chosen:
            python = ensure(root, name, platform=kind).python
            packed[f"{name}-{kind}"] = python.parents[1]
        with bar("packing environments") as progress:
            for number, (name, folder) in enumerate(packed.items()):
                progress.update(number, len(packed), name)
                _pack(folder, made / "environments" / f"{name}.tar")
        if outputs:
            _push(root, made / "store")
        files = {
            path.relative_to(made).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            for path in sorted([made / "repository.bundle", *(made / "environments").glob("*.tar")])
        }
        manifest: dict[str, Any] = {
            "schema": SCHEMA, "commit": commit, "platform": kind, "python": platform.python_version(),
            "machine": platform.machine(), "outputs": outputs, "files": files,
        }  # fmt: skip
        write_json(made / "bundle.json", manifest)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    return Bundled(to, tuple(packed), size)


def _pack(folder: Path, tar: Path) -> None:
    """Pack an environment. The same environment gives the same bytes: files in order, without owners."""
    real = folder.resolve()

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts
        own = len(parts) == 1 and parts[0] in _OWN
        if (
            own
            or "__pycache__" in parts
            or (parts[0] == "bin" and Path(member.name).name.startswith(("python", "activate")))
        ):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(tar, "w") as packed:
        for path in sorted(real.iterdir()):
            packed.add(path, arcname=path.name, filter=plain)


def _push(root: Path, store: Path) -> None:
    store.mkdir()
    name = "bundle-" + hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:8]
    dvc = [sys.executable, "-m", "dvc"]
    _call(root, [*dvc, "remote", "add", "--local", "--force", "-q", name, str(store.resolve())])
    try:
        _call(root, [*dvc, "push", "--run-cache", "-q", "--remote", name])
    finally:
        _call(root, [*dvc, "remote", "remove", "--local", "-q", name])


def _call(root: Path, command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        shown = " ".join(Path(part).name if part == sys.executable else part for part in command[:4])
        raise WorkerError(f"`{shown}` failed: {done.stderr.strip()}")
