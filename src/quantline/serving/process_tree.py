"""Runs one command and ends all its processes, whatever happens to the process that started it.

A script for the core's own interpreter, started as `python process_tree.py GRACE_SECONDS COMMAND ...`; standard library
only. Its standard input is a pipe from the parent. When the parent closes the pipe or is killed, the supervisor ends the
command's whole process tree. A byte in the pipe means that the command is ready: from then on it gets GRACE_SECONDS to shut
down. While vLLM loads, it ignores SIGTERM and has nothing to clean up, so it gets less. A pipe is used
because the signal of PR_SET_PDEATHSIG already comes when the *thread* that started the process ends.

The supervisor is a child subreaper: it still finds a descendant whose own parent died or which started its own session.
The command gets its own temporary folder, where vLLM leaves its sockets; the folder is removed at the end.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# The path of a Unix socket holds 107 characters; vLLM's part takes 37.
LONGEST_TEMPORARY = 40
GRACE_WHILE_STARTING = 0.5


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


def _run(grace: float, command: list[str]) -> int:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: received.append(got))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    above = tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_TEMPORARY else "/tmp"  # noqa: S108
    folder = tempfile.mkdtemp(prefix="quantline-serve-", dir=above)
    is_up = False
    try:
        tree = _Tree(command, folder)
        try:
            while tree.status is None and not received:
                readable, _, _ = select.select([0], [], [], 0.2)
                if readable:
                    if not os.read(0, 1):
                        break
                    is_up = True
                tree.reap()
        finally:
            tree.end(grace if is_up else GRACE_WHILE_STARTING)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = tree.status or 0
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(_run(float(sys.argv[1]), sys.argv[2:]))
