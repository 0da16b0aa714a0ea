"""Where the servers of several variants go, so that they fit together in memory. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantline.core.errors import UserError
from quantline.core.text import binary_size
from quantline.planning.checkpoint_memory import GPU_CONTEXT
from quantline.serving.memory import GIB, activations, kv_cache

# Resident memory of a vLLM server on a CPU besides weights, cache and activations: 1.3 GiB was measured for vLLM 0.32 with
# the demo model, by processes that each import torch.
CPU_PROCESSES = 1.5 * GIB
# What a server on a GPU keeps besides weights, cache and context when it has compiled the model and recorded CUDA graphs:
# 1.0 to 1.1 GB were measured for three variants of Llama-2-7B's shape on one H200 (vLLM 0.25.1).
GRAPHS = 1.0 * GIB
# What is left free of each device, for what others allocate meanwhile.
SPARE = 0.05
# Sequences that the cache of a server on a GPU is to hold where `serve.process.kv_cache_gib` is null.
SEQUENCES = 8


@dataclass(frozen=True)
class Need:
    """What one server needs: `total` over `ranks` GPUs, or in main memory. cache: its part for keys and values."""

    name: str
    weights: int
    cache: int
    other: int
    ranks: int = 1

    @property
    def each(self) -> int:
        """On each of its devices; every GPU has its own context and activations."""
        return -(-(self.weights + self.cache) // self.ranks) + self.other


@dataclass(frozen=True)
class Device:
    """A GPU, or the main memory. index: of the GPU; None is main memory. free: what may be used."""

    index: int | None
    total: int
    free: int

    @property
    def name(self) -> str:
        """For messages."""
        return "main memory" if self.index is None else f"GPU {self.index}"


@dataclass(frozen=True)
class Place:
    """Where a server goes: indexes of GPUs, none for main memory; and the share of each GPU's memory that it may use."""

    gpus: tuple[int, ...]
    share: float | None


def need_of(
    name: str,
    config: Mapping[str, Any],
    weights: int,
    *,
    context: int,
    cache_bytes: int | None,
    ranks: int,
    device: str,
) -> Need:
    """What a server needs.

    Args:
        name: of the variant.
        config: the model's config.json.
        weights: size of the checkpoint's weights.
        context: tokens of prompt and answer.
        cache_bytes: for keys and values; None reserves `SEQUENCES` sequences of `context` tokens.
        ranks: GPUs that the model is split over.
        device: `cpu` or `cuda`.
    """
    kept = kv_cache(config)
    cache = cache_bytes if cache_bytes is not None else kept.bytes(context, SEQUENCES) if kept else GIB
    working = activations(config, SEQUENCES) or GIB
    return Need(
        name, weights, cache, int(working + (GPU_CONTEXT + GRAPHS if device == "cuda" else CPU_PROCESSES)), ranks
    )


def place(needs: Sequence[Need], devices: Sequence[Device]) -> dict[str, Place]:
    """A place for every server: the largest first, each on the devices with the most room left.

    Raises:
        UserError: they do not fit together; the message says what each needs and what there is.
    """
    left = {device.index: device.free - int(SPARE * device.total) for device in devices}
    total = {device.index: device.total for device in devices}
    found: dict[str, Place] = {}
    for need in sorted(needs, key=lambda one: -one.each):
        roomiest = sorted(left, key=lambda index: (-left[index], index if index is not None else -1))
        chosen = roomiest[: need.ranks]
        if len(chosen) < need.ranks or any(left[index] < need.each for index in chosen):
            raise UserError(_told(needs, devices, need))
        for index in chosen:
            left[index] -= need.each
        gpus = tuple(sorted(index for index in chosen if index is not None))
        share = max(need.each / total[index] for index in chosen) if gpus else None
        found[need.name] = Place(gpus, None if share is None else min(0.98, round(share + 0.005, 3)))
    return found


def _told(needs: Sequence[Need], devices: Sequence[Device], failed: Need) -> str:
    lines = [
        f"  {need.name}: {binary_size(need.each)}{f' on each of {need.ranks} GPUs' if need.ranks > 1 else ''} "
        f"({binary_size(need.weights)} of weights, {binary_size(need.cache)} of cache)"
        for need in needs
    ]
    free = ", ".join(
        f"{device.name} has {binary_size(device.free)} free of {binary_size(device.total)}" for device in devices
    )
    return "\n".join([
        f"the variants do not fit together, {failed.name} finds no place; {free or 'there is no GPU'}:", *lines,
        "leave one out, take smaller ones, or lower serve.process.kv_cache_gib or serve.max_model_len",
    ])  # fmt: skip
