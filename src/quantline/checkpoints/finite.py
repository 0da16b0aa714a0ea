"""Finds infinite values and NaN in a checkpoint's tensors, at the speed of reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.safetensors_file import SafetensorsFile

# dtype -> bytes of a value, and the bits of the smallest positive value that is not finite (IEEE 754; bfloat16 is the upper
# half of a float32; F8_E4M3, "fn", has no infinity, only a NaN).
_LIMITS = {
    "F64": (8, 0x7FF0_0000_0000_0000), "F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C), "F8_E4M3": (1, 0x7F),
}  # fmt: skip


def nonfinite(folder: Path) -> dict[str, int]:
    """How many values of a tensor are infinite or NaN, by the names of the tensors that have any.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint.open(folder)
    files = {name: SafetensorsFile.open(folder / name) for name in sorted(set(checkpoint.shards.values()))}
    found = {}
    for file in files.values():
        for name, info in file.infos.items():
            size, limit = _LIMITS.get(info.dtype, (0, 0))
            count = sum(_count(chunk, size, limit) for chunk in file.chunks(name)) if size else 0
            if count:
                found[name] = count
    return found


def _count(chunk: bytearray, size: int, limit: int) -> int:
    # As integers, values that are not finite are the largest of either sign: two maxima tell whether there are any.
    signed, unsigned = np.frombuffer(chunk, f"<i{size}"), np.frombuffer(chunk, f"<u{size}")
    sign = 1 << (8 * size - 1)
    if signed.max() < limit and unsigned.max() < sign + limit:
        return 0
    return int(np.count_nonzero((unsigned & unsigned.dtype.type(sign - 1)) >= limit))
