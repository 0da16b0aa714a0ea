"""The Envoy of a fleet: from the environment `router`, or another one that `toolchains.router=PATH` names."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.toolchains.environments import ensure

# The one with which the documents of a fleet were tried; older ones were not.
OLDEST = (1, 40)


@dataclass(frozen=True)
class Envoy:
    """A working Envoy. version: such as `1.40.0`; build: the whole line that it prints of itself."""

    program: Path
    version: str
    build: str

    def validate(self, document: Mapping[str, Any], path: Path) -> None:
        """Check a whole document, with its clusters and routes in it.

        path: where it is written for that, readable by this user alone, since it may hold keys; it is removed.

        Raises:
            UserError: Envoy does not take it; the message has its reason.
        """
        write_json(path, document)
        try:
            path.chmod(0o600)
            command = [str(self.program), "--mode", "validate", "-c", str(path), "-l", "error"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            path.unlink(missing_ok=True)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"Envoy {self.version} does not take the fleet's documents: {last[0]}")


def envoy(root: Path, given: str | None = None) -> Envoy:
    """The Envoy to use. given: the path of a program; None takes that of the locked environment, which is built if need be.

    Raises:
        UserError: there is no Envoy at that path, or it is too old.
        WorkerError: the environment cannot be built.
    """
    if given is not None:
        return _examined(Path(given).expanduser().absolute(), f"toolchains.router={given}")
    # The same program serves machines with and without GPUs.
    folder = ensure(root, "router", platform="cpu").python.parents[1]
    found = sorted(folder.glob("lib/python*/site-packages/envoy/_bin/envoy"))
    return _examined(found[0].absolute() if found else folder, f".venvs/{folder.name}")


def _examined(program: Path, named: str) -> Envoy:
    remedy = "give the path of an Envoy program, or leave it null"
    if not program.is_file() or not os.access(program, os.X_OK):
        raise UserError(f"{named}: is no program; {remedy}")
    try:
        done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{named}: cannot be run ({error}); {remedy}") from None
    build = re.search(r"version: (\S*/(\d+)\.(\d+)\.(\d+)\S*/\S*)", done.stdout)
    if not build:
        raise UserError(f"{named}: does not say that it is Envoy; {remedy}")
    version = tuple(int(part) for part in build.group(2, 3, 4))
    if version[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"{named}: is Envoy {'.'.join(map(str, version))}; a fleet needs {oldest} or newer")
    return Envoy(program, ".".join(map(str, version)), build.group(1))
