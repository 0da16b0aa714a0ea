"""The visible NVIDIA GPUs and their current use, as NVML reports them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quantline.core.errors import UserError


@dataclass(frozen=True)
class AcceleratorUse:
    """Memory in use, summed over the visible GPUs, and the utilisation of the busiest one (None if none reports it)."""

    memory_bytes: int
    utilisation_percent: float | None


@dataclass(frozen=True)
class Gpu:
    """One visible GPU and its current use by all processes.

    utilisation_percent, power_watts and compute_capability are None where the board or the driver does not report them.
    compute_capability: 89 for 8.9.
    """

    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation_percent: float | None
    power_watts: float | None
    compute_capability: int | None


def accelerator_use() -> AcceleratorUse | None:
    """The current use of the visible GPUs by all processes; None without a GPU, a driver or the NVML library."""
    gpus = visible_gpus()
    if not gpus:
        return None
    busy = [gpu.utilisation_percent for gpu in gpus if gpu.utilisation_percent is not None]
    return AcceleratorUse(sum(gpu.memory_used_bytes for gpu in gpus), max(busy, default=None))


def refuse_more_gpus(option: str, count: int, device: str) -> None:
    """Refuse more GPUs than this machine has; with device=cpu, there are processes instead.

    Raises:
        UserError: with the option's name.
    """
    found = len(visible_gpus())
    if device == "cuda" and count > found:
        raise UserError(
            f"{option}={count}: this machine shows {found} GPU{'' if found == 1 else 's'}; give at most {found}"
        )


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES selects; empty without a GPU, a driver or the NVML library."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the library is optional, and creates its error classes at run time
        return []
    try:
        return [_gpu(pynvml, index) for index in _visible(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def reported(ask: Callable[[Any], Any]) -> Any:
        with suppress(nvml.NVMLError):
            return ask(handle)
        return None

    memory, name = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetName(handle)
    rates = reported(nvml.nvmlDeviceGetUtilizationRates)
    milliwatts = reported(nvml.nvmlDeviceGetPowerUsage)
    capability = reported(nvml.nvmlDeviceGetCudaComputeCapability)
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else str(name),
        memory_used_bytes=int(memory.used),
        memory_total_bytes=int(memory.total),
        utilisation_percent=None if rates is None else float(rates.gpu),
        power_watts=None if milliwatts is None else float(milliwatts) / 1000,
        compute_capability=None if capability is None else 10 * int(capability[0]) + int(capability[1]),
    )


def _visible(count: int) -> list[int]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = [int(name) for name in named if name.strip().isdigit()]
    return [index for index in chosen if index < count] or list(range(count))
