"""Servers that stay up between the stages of one run of the pipeline, so that each checkpoint is loaded once.

A stage that has finished with a server hands it on instead of ending it. The next stage that asks for the same one takes it
over: the same interpreter, checkpoint (by its content), arguments and environment. One is kept of the float model and one of
a variant. `process_tree.py` supervises a kept server and ends it when nobody asks for it, and when its owner ends, which is
the process that runs the stages. What is known of a kept server is in its supervisor's temporary folder, so nothing is left
of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from quantline.serving.process_tree import FOLDERS, KEPT, LINE, above

Role = Literal["float", "variant"]
# Of a shell, and of the folder that a command was started in; a server reads none of them.
_NOT_READ = ("_", "SHLVL", "PWD", "OLDPWD")
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Keeping:
    """How a stage shares a server with others.

    Attributes:
        owner: the process on whose behalf servers are kept.
        role: whether it is of the float model or of a variant. One of each is kept.
        content: a hash of what is in the checkpoint's folder.
        stage: the name of the stage.
        onward: hand the server on where the stage succeeds.
        fresh: start one of its own, for a stage that measures how it loads.
    """

    owner: int
    role: Role
    content: str
    stage: str
    onward: bool = True
    fresh: bool = False


@dataclass(frozen=True)
class Kept:
    """A server that waits for a stage. known: what its last stage noted, see `serving.server`."""

    folder: Path
    known: Mapping[str, Any]

    def take(self) -> Adopted | None:
        """Take it over; None if it has ended, or if another process was faster."""
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(_PATIENCE_SECONDS)
        try:
            line.connect(str(self.folder / LINE))
            if line.recv(1) == b"+":
                return Adopted(line)
        except OSError:
            pass
        line.close()
        return None


class Adopted:
    """The supervisor of a server that another process started, with the part of `subprocess.Popen` that a server needs."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        # The process that listened, then its user and group (unix(7)).
        self.pid = int.from_bytes(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        self.stdin = _Line(line)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self._code is None and not _runs(self.pid):
            try:
                self._line.setblocking(False)
                self._code = int(self._line.recv(16) or -signal.SIGKILL)
            except (OSError, ValueError):
                self._code = -signal.SIGKILL
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        with suppress(psutil.NoSuchProcess):
            try:
                psutil.Process(self.pid).wait(timeout)
            except psutil.TimeoutExpired:
                if _runs(self.pid):  # one that ended may wait for its own parent
                    raise subprocess.TimeoutExpired("process_tree.py", timeout or 0.0) from None
        return self.poll() or 0

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, how: signal.Signals) -> None:
        if _runs(self.pid):
            with suppress(ProcessLookupError):
                os.kill(self.pid, how)


class _Line:
    """The connection to a supervisor, in the place of the pipe to one that was started here."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def write(self, data: bytes) -> None:
        self._line.sendall(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Let go of it. Its last message can still be read."""
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def identity(command: Sequence[str], variables: Mapping[str, str], content: str) -> str:
    """What two servers must share to be the same: a hash.

    Args:
        command: that starts it, without its port.
        variables: its environment.
        content: a hash of the checkpoint.
    """
    # What a library put into the environment of this process is not there in the next stage.
    own = {key for key, value in os.environ.items() if variables.get(key) == value} - psutil.Process().environ().keys()
    kept = sorted((key, value) for key, value in variables.items() if key not in _NOT_READ and key not in own)
    return hashlib.sha256(json.dumps([list(command), kept, content]).encode()).hexdigest()


def kept_of(owner: int) -> Iterator[Kept]:
    """The servers that wait for a stage of an owner."""
    for path in sorted(above().glob(f"{FOLDERS}*/{KEPT}")):
        with suppress(OSError, ValueError):  # it ended meanwhile
            # Others may write into the folder of temporary files, too.
            if path.parent.stat().st_uid == os.getuid():
                known = json.loads(path.read_text(encoding="utf-8"))
                if known["owner"] == owner:
                    yield Kept(path.parent, known)
