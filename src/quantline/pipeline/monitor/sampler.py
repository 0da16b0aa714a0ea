"""Samples the resources of a process tree and its machine until stdin closes, then prints one JSON line and exits.

Started by `monitor.py` as `python -I -S sampler.py PID INTERVAL MOST_ROWS PATH ...`. The paths contain psutil, the NVML
library and this package. It is a process, not a thread, because a thread would compete with the stage for the
interpreter lock. It keeps all samples in memory and writes no file. If the stage is killed, stdin closes as well. When
MOST_ROWS is reached, it drops every second row and from then on keeps half as many; the peak is over all samples.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

sys.path[:0] = sys.argv[4:]

import psutil  # noqa: E402

from quantline.core.gpu import visible_gpus  # noqa: E402

_PAGE, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


def _stat(pid: str) -> list[bytes]:
    """The fields of /proc/PID/stat after the process name: state, parent, ...; empty if the process has ended."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return []
    try:
        return os.read(file, 4096).rpartition(b")")[2].split()
    except OSError:
        return []
    finally:
        os.close(file)


class Sampler:
    """Collects rows with the columns in `columns`; the first column is the seconds since the first row."""

    def __init__(self, pid: int, most: int) -> None:
        self.root = pid
        self.most = most
        self.gpus = len(visible_gpus())
        self.columns = [
            "seconds", "cpu_percent", "rss_bytes", "system_memory_used_bytes", "system_memory_total_bytes",
            *(f"gpu{gpu}_{what}" for gpu in range(self.gpus) for what in
              ("memory_used_bytes", "memory_total_bytes", "utilisation_percent", "power_watts")),
        ]  # fmt: skip
        self.rows: list[list[float | None]] = []
        self.peak: list[float | None] = [None] * len(self.columns)
        self.stride, self.taken = 1, 0
        self._started = self._last = time.monotonic()
        self._busy: dict[int, float] = {}
        self.latest: list[float | None] = []

    def sample(self) -> None:
        """Take a sample; keep it if it falls on the stride."""
        now = time.monotonic()
        resident, busy = self._tree()
        # All CPU time of a process that is new since the last row is counted; a process that ended in between is not.
        spent = sum(seconds - self._busy.get(pid, 0.0) for pid, seconds in busy.items())
        share = 100 * max(spent, 0.0) / (now - self._last) if self.taken and now > self._last else 0.0
        memory = psutil.virtual_memory()
        row: list[float | None] = [
            round(now - self._started, 3), round(share, 1), resident, memory.total - memory.available, memory.total
        ]  # fmt: skip
        if self.gpus:
            for gpu in visible_gpus():
                row += [gpu.memory_used_bytes, gpu.memory_total_bytes, gpu.utilisation_percent, gpu.power_watts]
        self._busy, self._last = busy, now
        if len(row) == len(self.columns):
            self._keep(row)

    def _tree(self) -> tuple[int, dict[int, float]]:
        """Resident bytes of the tree, and CPU seconds of each of its processes."""
        # psutil finds the tree by the same pass over /proc and then reads the files of each process again.
        children: dict[int, list[int]] = {}
        used: dict[int, tuple[int, float]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                fields = _stat(name)
                if fields:
                    children.setdefault(int(fields[1]), []).append(int(name))
                    used[int(name)] = int(fields[21]) * _PAGE, (int(fields[11]) + int(fields[12])) / _TICKS
        resident, busy, ahead = 0, {}, [self.root]
        while ahead:
            pid = ahead.pop()
            if pid in used and pid != os.getpid():
                resident, busy[pid] = resident + used[pid][0], used[pid][1]
                ahead += children.get(pid, [])
        return resident, busy

    def _keep(self, row: list[float | None]) -> None:
        self.latest = row
        self.peak = [
            new if old is None else old if new is None else max(old, new)
            for old, new in zip(self.peak, row, strict=True)
        ]
        if self.taken % self.stride == 0:
            self.rows.append(row)
        self.taken += 1
        if len(self.rows) >= self.most:  # one row is reserved for the last sample
            self.rows, self.stride = self.rows[::2], self.stride * 2

    def report(self, interval: float) -> dict[str, Any]:
        """The result as plain values; it always includes the last row."""
        rows = self.rows if self.rows[-1:] == [self.latest] else [*self.rows, self.latest]
        named = [dict(zip(self.columns, row, strict=True)) for row in (rows[0], self.latest, self.peak)]
        before, after, peak = ({key: row[key] for key in self.columns[1:]} for row in named)
        return {
            "interval_seconds": interval * self.stride, "columns": self.columns, "samples": rows,
            "before": before, "after": after, "peak": peak,
        }  # fmt: skip


def main() -> None:
    """Sample until stdin is closed."""
    parent, interval, most = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    sampler = Sampler(parent, most)
    while True:
        sampler.sample()
        if select.select([0], [], [], interval)[0] or os.getppid() != parent:
            break
    sampler.sample()
    print(json.dumps(sampler.report(interval)), flush=True)


if __name__ == "__main__":
    main()
