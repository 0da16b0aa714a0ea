"""A process of a fleet that ends with it, however the fleet ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from quantline.core.errors import ServerError
from quantline.serving import process_tree
from quantline.serving.server_log import ending, failure_reason

# Envoy and the gauge end at once; a server of vLLM is started by `quantline.serving.server`.
GRACE_SECONDS = 5.0


class Child:
    """A running command below a supervisor, which ends it when this process closes its pipe or is killed.

    log: gets what it prints, appended.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = [sys.executable, "-I", "-S", str(Path(process_tree.__file__)), str(GRACE_SECONDS)]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*supervisor, *command], env={**os.environ, **(variables or {})}, stdin=subprocess.PIPE, stdout=sink,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int | None:
        """Of the command itself; None if it has ended."""
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children()
            return below[0].pid if below else None
        return None

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def require_alive(self, doing: str) -> None:
        """Check that it runs.

        Raises:
            ServerError: it ended; the message gives the reason from its log.
        """
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"{self.name} {ending(code)} while {doing}: {failure_reason(self.log)}; log: {self.log}")

    def tell_up(self) -> None:
        """Tell the supervisor that it is ready, so that it gets time to end by itself."""
        with suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.write(b"+")
                self.process.stdin.flush()

    def end(self, *, kill: bool = False) -> None:
        """End it; return when it has ended. kill: without time to end by itself."""
        pid = self.pid
        if kill and pid is not None:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(GRACE_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_until(holds: object, seconds: float, pause: float = 0.02) -> bool:
    """Whether the function `holds` became true within `seconds`."""
    assert callable(holds)
    limit = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > limit:
            return False
        time.sleep(pause)
    return True
