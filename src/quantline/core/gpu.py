"""What an NVIDIA GPU says about its use; nothing where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

import os
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class AcceleratorUse:
    """Memory in use summed over the visible GPUs, and the highest share of time that one of them was busy."""

    memory_bytes: int
    utilisation_percent: float


@dataclass(frozen=True)
class Gpu:
    """One visible GPU now, used by whomever. power_watts is None where the board does not tell."""

    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation_percent: float
    power_watts: float | None


def accelerator_use() -> AcceleratorUse | None:
    """The use of the visible GPUs now, by everybody; None without a driver or without the library that asks it."""
    gpus = visible_gpus()
    if not gpus:
        return None
    return AcceleratorUse(sum(gpu.memory_used_bytes for gpu in gpus), max(gpu.utilisation_percent for gpu in gpus))


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; none without a driver or without the library that asks it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the library is optional, and its errors are classes made at run time
        return []
    try:
        return [_gpu(pynvml, index) for index in _visible(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    power = None
    with suppress(nvml.NVMLError):
        power = float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000
    name = nvml.nvmlDeviceGetName(handle)
    return Gpu(
        name.decode() if isinstance(name, bytes) else str(name), int(memory.used), int(memory.total),
        float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), power,
    )  # fmt: skip


def _visible(count: int) -> list[int]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = [int(name) for name in named if name.strip().isdigit()]
    return [index for index in chosen if index < count] or list(range(count))


def this_gpu() -> tuple[int | None, int | None]:
    """Compute capability (89 for 8.9) and memory in bytes of the first GPU; None where nobody can tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return 10 * int(major) + int(minor), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except Exception:  # the library is optional, and its errors are classes made at run time
        return None, None
