"""Runs one command and ends all its processes, whatever happens to the process that started it.

A script for the core's own interpreter, started as `python process_tree.py GRACE_SECONDS[:OWNER] COMMAND ...`; standard
library only. Its standard input is a pipe from the parent. When the parent closes the pipe or is killed, the supervisor
ends the command's whole process tree. `+` in the pipe means that the command is ready: from then on it gets GRACE_SECONDS
to shut down. While vLLM loads, it ignores SIGTERM and has nothing to clean up, so it gets less. A pipe is used
because the signal of PR_SET_PDEATHSIG already comes when the *thread* that started the process ends.

`k` and a line of text hand the command on: it waits for another process to connect to the socket `line` in the command's
folder, beside which the text stands as `kept.json` meanwhile. The connection then is what the pipe was. Nobody waits for
longer than `IDLE_SECONDS`, nor after the process OWNER has ended; without an OWNER nothing is handed on.

The supervisor is a child subreaper: it still finds a descendant whose own parent died or which started its own session.
The command gets its own temporary folder, where vLLM leaves its sockets; the folder is removed at the end.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# The path of a Unix socket holds 107 characters; vLLM's part takes 37.
LONGEST_TEMPORARY = 40
GRACE_WHILE_STARTING = 0.5
# Longer than the stages between two that ask for the same server: half a minute each for the demo. The owner's end comes
# first where these take hours.
IDLE_SECONDS = 900.0
FOLDERS, KEPT, LINE = "quantline-serve-", "kept.json", "line"


class _Tree:
    """The command and everything below this process."""

    def __init__(self, command: list[str], folder: str) -> None:
        self.status: int | None = None
        self.leader = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "TMPDIR": folder},
            preexec_fn=_end_with_supervisor,  # noqa: PLW1509 (this process has one thread)
        )  # fmt: skip

    def reap(self) -> None:
        """Collect all ended children, adopted ones too; `Popen.poll` would collect only its own child."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.leader.pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.leader.returncode = self.status

    def members(self) -> list[int]:
        """Every living descendant."""
        self.reap()
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    # The name, in parentheses, may contain spaces. After the last one come the state and the parent.
                    state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                except (OSError, ValueError):
                    continue
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
        found, ahead = [], [os.getpid()]
        while ahead:
            below = children.get(ahead.pop(), [])
            found += below
            ahead += below
        return found

    def wait(self, seconds: float, *, leader_only: bool = False) -> bool:
        """Whether the leader, or the whole tree, was gone within `seconds`."""
        limit = time.monotonic() + seconds
        while True:
            left = self.members()
            if not left or (leader_only and self.status is not None):
                return True
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)

    def signal(self, how: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue

    def end(self, grace: float) -> None:
        """End the tree so that it can clean up: SIGTERM to the leader, then to the rest, then SIGKILL."""
        if self.status is None:
            self.signal(signal.SIGTERM, [self.leader.pid])
            self.wait(grace, leader_only=True)
        if not self.wait(0.2):
            self.signal(signal.SIGTERM, self.members())
            self.wait(min(grace, 2.0))
        # multiprocessing's resource tracker removes the shared memory that its killed users left, then ends by itself.
        self.signal(signal.SIGKILL, [pid for pid in self.members() if not _is_resource_tracker(pid)])
        self.wait(2.0)
        while not self.wait(0.5):
            self.signal(signal.SIGKILL, self.members())


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_with_supervisor() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Holder:
    """The process that uses the command: first the one that started it, then one after the other that connects."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder, self.is_up = folder, False
        self.owner = _watched(owner)
        self.line: int | None = 0
        self.connection: socket.socket | None = None
        self.listener: socket.socket | None = None
        self.until, self.said = 0.0, b""

    def wait(self, seconds: float) -> bool:
        """Wait for news; False once nobody wants the command."""
        if self.line is not None:
            readable, _, _ = select.select([self.line], [], [], seconds)
            return not readable or self._heard(self.line)
        assert self.listener is not None
        assert self.owner is not None
        listening = self.listener.fileno()
        readable, _, _ = select.select([listening, self.owner], [], [], seconds)
        if listening in readable:
            self._welcome(self.listener)
            return True
        return not readable and time.monotonic() < self.until

    def owner_ended(self) -> bool:
        return self.owner is None or bool(select.select([self.owner], [], [], 0)[0])

    def tell(self, status: int) -> None:
        """Tell a process that did not start the command how it ended."""
        if self.connection is not None:
            with suppress(OSError):
                self.connection.sendall(b"%d" % status)

    def _heard(self, line: int) -> bool:
        try:
            said = os.read(line, 65536)
        except OSError:
            return False
        self.said += said
        while self.said.startswith(b"+"):
            self.is_up, self.said = True, self.said[1:]
        note, whole, rest = self.said.partition(b"\n")
        if note.startswith(b"k") and whole:
            self.said = rest
            return self._hand_on(note[1:])
        return bool(said)

    def _hand_on(self, note: bytes) -> bool:
        if not self.is_up or self.owner_ended():
            return False
        if self.connection is not None:
            self.connection.close()
        self.line, self.connection = None, None
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.folder / LINE))
        self.listener.listen(1)
        self.until = time.monotonic() + IDLE_SECONDS
        half = self.folder / f"{KEPT}.tmp"
        half.write_bytes(note)
        half.rename(self.folder / KEPT)
        return True

    def _welcome(self, listener: socket.socket) -> None:
        (self.folder / KEPT).unlink(missing_ok=True)
        connection, _ = listener.accept()
        listener.close()  # one that connected meanwhile is turned away
        (self.folder / LINE).unlink(missing_ok=True)
        self.listener, self.connection, self.line, self.said = None, connection, connection.fileno(), b""
        with suppress(OSError):
            connection.sendall(b"+")


def _watched(pid: int) -> int | None:
    """A descriptor that is readable once a process has ended; None if it has."""
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None


def above() -> Path:
    """Where the commands' folders lie."""
    return Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_TEMPORARY else "/tmp")  # noqa: S108


def _run(grace: float, owner: int, command: list[str]) -> int:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: received.append(got))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder = tempfile.mkdtemp(prefix=FOLDERS, dir=above())
    holder = _Holder(Path(folder), owner)
    try:
        tree = _Tree(command, folder)
        try:
            while tree.status is None and not received and holder.wait(0.2):
                tree.reap()
        finally:
            # Nobody is left to wait for a clean end where the owner is gone.
            hurries = not holder.is_up or (holder.line is None and holder.owner_ended())
            tree.end(GRACE_WHILE_STARTING if hurries else grace)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = tree.status or 0
    code = 128 - status if status < 0 else status
    holder.tell(code)
    return code


if __name__ == "__main__":
    seconds, _, process = sys.argv[1].partition(":")
    sys.exit(_run(float(seconds), int(process or 0), sys.argv[2:]))
