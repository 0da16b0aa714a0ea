"""Samples the resources that a stage and its child processes use while it runs.

    with Monitor() as monitor:
        work()
        result["monitor"] = monitor.finish()

The sampler is a child process, see `sampler`. A failure of the sampler never fails the stage: the series is empty then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

INTERVAL_SECONDS = 1.0
MOST_ROWS = 200
# It usually answers at once, but may be delayed on a busy machine.
PATIENCE_SECONDS = 15.0


class Monitor:
    """Samples this process tree, the machine and its GPUs during a `with` block.

    Args:
        interval_seconds: between two samples.
        most_rows: number of rows that are kept; the peak is over all samples.
    """

    def __init__(self, interval_seconds: float = INTERVAL_SECONDS, most_rows: int = MOST_ROWS) -> None:
        self._settings = [str(os.getpid()), str(interval_seconds), str(most_rows)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Monitor:
        script = str(Path(__file__).with_name("sampler.py"))
        # Isolated and without the start-up files of site-packages it starts in 0.1 s; it gets its import paths as arguments.
        command = [sys.executable, "-I", "-S", script, *self._settings, *filter(None, sys.path)]
        with suppress(OSError):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def finish(self) -> dict[str, Any]:
        """Stop sampling and return the series; empty if there is none.

        Returns:
            interval_seconds, `columns`, `samples` (rows of their values), and `before`, `after` and `peak` by column.
            Memory is in bytes; rss_bytes counts a shared page once per process; cpu_percent is 100 for one core.
        """
        process, self._process = self._process, None
        if process is None:
            return {}
        try:
            output, _ = process.communicate(timeout=PATIENCE_SECONDS)
            series = json.loads(output)
        except (subprocess.SubprocessError, OSError, ValueError):
            return {}
        finally:
            _end(process)
        return series if isinstance(series, dict) else {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            _end(self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
