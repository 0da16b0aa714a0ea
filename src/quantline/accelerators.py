"""What an NVIDIA GPU says about its use; nothing where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class AcceleratorUse:
    """Memory in use summed over the visible GPUs, and the highest share of time that one of them was busy."""

    memory_bytes: int
    utilisation_percent: float


def accelerator_use() -> AcceleratorUse | None:
    """The use of the visible GPUs now, by everybody; None without a driver or without the library that asks it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the library is optional, and its errors are classes made at run time
        return None
    try:
        memory, busy = 0, 0.0
        for index in _visible(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory += int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            busy = max(busy, float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        return AcceleratorUse(memory, busy)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _visible(count: int) -> list[int]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = [int(name) for name in named if name.strip().isdigit()]
    return [index for index in chosen if index < count] or list(range(count))
