"""Checks of a quantized checkpoint's files without decoding weights: NumPy and headers only.

All faults are reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers, to_float32
from quantline.checkpoints.companions import COMPANIONS
from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.linears import LM_HEAD
from quantline.checkpoints.model_config import ties_head
from quantline.core.errors import UserError
from quantline.core.files import read_json

# Buffers in older checkpoints that models compute themselves: rotary frequencies and causal masks.
_BUFFERS = re.compile(r"(?:inv_freq|masked_bias|attn\.bias|attention\.bias)$")
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class FileChecks:
    """The findings of the file checks.

    Attributes:
        faults: what makes the checkpoint unusable.
        warnings: what the user should know.
        linears: name -> (in_features, out_features) of the quantized linears, as in the float model.
        stored_bits: name -> bits of all tensors of a quantized linear except its bias.
        zero_scales, scales: number of zero scales, and of all scales.
        weights, bits: number of weights and of bits in the whole model.
    """

    faults: list[str]
    warnings: list[str] = field(default_factory=list)
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    stored_bits: dict[str, int] = field(default_factory=dict)
    zero_scales: int = 0
    scales: int = 0
    weights: int = 0
    bits: int = 0

    @property
    def quantized_weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(wide * tall for wide, tall in self.linears.values())

    @property
    def effective_bits(self) -> float:
        """Bits per quantized weight, including its share of scales, zero points and indexes."""
        return sum(self.stored_bits.values()) / max(self.quantized_weights, 1)


def inspect(model: Path, output: Path, expected: Sequence[str]) -> FileChecks:
    """Compare a quantized checkpoint with the float model that it was made from.

    Args:
        model: folder of the float model.
        output: folder of the quantized one.
        expected: names of the linears that should be quantized.
    """
    floats = Checkpoint.open(model)
    weights = sum(math.prod(floats.info(name).shape) for name in floats.names)
    faults = _companion_faults(model, output)
    try:
        checkpoint, info = Checkpoint.open(output), quantization_of(output)
        layers = quantized_layers(checkpoint, info)
    except (
        UserError
    ) as error:  # a shard is missing or truncated, an index names a missing tensor, a layer is incomplete
        return FileChecks([*faults, str(error)], weights=weights)
    bits = 8 * sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    if not layers:
        return FileChecks([*faults, "nothing was quantized: every weight is unchanged"], weights=weights, bits=bits)
    left = [name for name in expected if name not in layers]
    if left:
        faults.append(f"{len(left)} of {len(expected)} linears were not quantized: {some(left)}")
    extra = [name for name in layers if name not in set(expected)]
    if extra:
        faults.append(f"{len(extra)} linears were quantized but should have stayed float: {some(extra)}")
    linears, stored_bits = {}, {}
    for name, suffixes in layers.items():
        if f"{name}.weight" not in floats.names:
            faults.append(f"{name} is quantized but is not a linear of the float model")
            continue
        tall, wide = floats.info(f"{name}.weight").shape
        linears[name] = int(wide), int(tall)
        stored = [tensor for suffix, tensor in suffixes.items() if suffix != "bias"]
        stored_bits[name] = 8 * sum(checkpoint.info(tensor).nbytes for tensor in stored)
    tied = ties_head(read_json(model / "config.json"))
    faults += _absent_faults(floats, checkpoint, layers, tied=tied)
    scales = _scales(checkpoint, layers, LAYOUTS[info.layout].scales if info is not None else ())
    return FileChecks(
        [*faults, *scales.faults], scales.warnings, linears, stored_bits, scales.zeros, scales.count, weights, bits
    )


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _companion_faults(model: Path, output: Path) -> list[str]:
    faults = []
    wanted = ["config.json"]
    wanted += [path.name for path in sorted(model.iterdir()) if any(fnmatch(path.name, like) for like in COMPANIONS)]
    missing = [name for name in wanted if not (output / name).exists()]
    if missing:
        faults.append(f"{some(missing)}: missing, although the float model has it")
    empty = [name for name in wanted if (output / name).is_file() and not (output / name).stat().st_size]
    empty = [name for name in empty if (model / name).stat().st_size]
    if empty:
        faults.append(f"{some(empty)}: empty")
    return faults


def _absent_faults(
    floats: Checkpoint, checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, str]], *, tied: bool
) -> list[str]:
    names = set(checkpoint.names)
    missing = [
        name for name in floats.names
        if name not in names and name.removesuffix(".weight") not in layers
        and not (tied and name == f"{LM_HEAD}.weight") and not _BUFFERS.search(name)
    ]  # fmt: skip
    return [f"{len(missing)} tensors of the float model are missing: {some(missing)}"] if missing else []


@dataclass(frozen=True)
class _Scales:
    zeros: int
    count: int
    faults: list[str]
    warnings: list[str]


def _scales(
    checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, str]], suffixes_of_scales: Sequence[str]
) -> _Scales:
    unsound, dead, partly = [], [], []
    count, zero = 0, 0
    for layer, suffixes in layers.items():
        for suffix, name in suffixes.items():
            if suffix not in suffixes_of_scales or checkpoint.info(name).dtype not in _FLOATS:
                continue
            values = to_float32(checkpoint.tensor(name))
            zeros = int((values == 0).sum())
            count, zero = count + values.size, zero + zeros
            if not np.isfinite(values).all():
                unsound.append(layer)
            elif zeros == values.size:
                dead.append(layer)
            elif zeros:
                partly.append(layer)
    faults, warnings = [], []
    if unsound:
        faults.append(f"scales are NaN or infinite in {len(unsound)} linears: {some(unsound)}")
    if dead:
        faults.append(f"all scales, and so all weights, are zero in {len(dead)} linears: {some(dead)}")
    if partly:
        warnings.append(f"{zero} of {count} scales, and so their weights, are zero in {some(partly)}")
    return _Scales(zero, count, faults, warnings)
