"""How many cores this process may use, and how many tensors are computed on them at the same time."""

from __future__ import annotations

import os

import psutil

# Long enough to see a process that works in bursts.
_LOOK_SECONDS = 2.0
# Each tensor needs memory of its own, and the disk does not keep up with more.
_MOST_TENSORS = 8


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cores_in_use(seconds: float = _LOOK_SECONDS) -> float:
    """The cores of this machine that processes keep busy, on average over so many seconds; this one sleeps meanwhile."""
    return float(psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1))


def tensors_at_once() -> int:
    """Tensors that are rounded or packed at the same time, by a core each."""
    return min(cores(), _MOST_TENSORS)
