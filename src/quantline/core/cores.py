"""How many cores this process may use, and how many tensors are computed on them at the same time."""

from __future__ import annotations

import os

# Each tensor needs memory of its own, and the disk does not keep up with more.
_MOST_TENSORS = 8


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tensors_at_once() -> int:
    """Tensors that are rounded or packed at the same time, by a core each."""
    return min(cores(), _MOST_TENSORS)
