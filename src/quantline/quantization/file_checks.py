"""Checks of a quantized checkpoint's files without decoding weights: NumPy and headers only.

All faults are reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers, to_float32
from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.checkpoints.linears import is_due, is_wide, numbered
from quantline.checkpoints.model_config import dimensions, ties_head
from quantline.checkpoints.model_files import COMPANIONS, matching
from quantline.core.errors import UserError
from quantline.core.files import read_json

# Buffers in older checkpoints that models compute themselves: rotary frequencies and causal masks.
_BUFFERS = re.compile(r"(?:inv_freq|masked_bias|attn\.bias|attention\.bias)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
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
        expected: number of linears that the float model's shapes and config.json call for.
        weights, bits: number of weights and of bits in the whole model.
    """

    faults: list[str]
    warnings: list[str] = field(default_factory=list)
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    stored_bits: dict[str, int] = field(default_factory=dict)
    zero_scales: int = 0
    scales: int = 0
    expected: int = 0
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


def inspect(model: Path, output: Path, expected: Sequence[str], rules: Sequence[Mapping[str, Any]] = ()) -> FileChecks:
    """Compare a quantized checkpoint with the float model that it was made from.

    What should be quantized is also counted from the model's shapes and the number of layers in its config.json, apart
    from the list that the quantizer was given.

    Args:
        model: folder of the float model.
        output: folder of the quantized one.
        expected: names of the linears that should be quantized.
        rules: exceptions by name, see `select_linears`.
    """
    floats, config = Checkpoint.open(model), read_json(model / "config.json")
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
    if info is not None and LAYOUTS[info.layout].whole:  # embeddings and the output layer are quantized, too
        outside = [name for name in layers if name not in set(expected) and numbered(name) is None]
    else:
        outside = []
    extra = [name for name in layers if name not in {*expected, *outside}]
    if extra:
        faults.append(f"{len(extra)} linears were quantized but should have stayed float: {some(extra)}")
    linears, stored_bits = {}, {}
    for name, suffixes in layers.items():
        if name in outside:
            continue
        if f"{name}.weight" not in floats.names:
            faults.append(f"{name} is quantized but is not a linear of the float model")
            continue
        tall, wide = floats.info(f"{name}.weight").shape
        linears[name] = int(wide), int(tall)
        stored = [tensor for suffix, tensor in suffixes.items() if suffix != "bias"]
        stored_bits[name] = 8 * sum(checkpoint.info(tensor).nbytes for tensor in stored)
    faults += _absent_faults(floats, checkpoint, layers, tied=ties_head(config))
    due = _due(floats, config, rules)
    faults += _missed_faults(due, layers, expected)
    faults += _router_faults(floats, config, layers)
    scales = _scales(checkpoint, layers, LAYOUTS[info.layout].scales if info is not None else ())
    return FileChecks(
        [*faults, *scales.faults], scales.warnings, linears, stored_bits, scales.zeros, scales.count,
        len(due | set(linears)), weights, bits,
    )  # fmt: skip


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _companion_faults(model: Path, output: Path) -> list[str]:
    faults = []
    wanted = ["config.json"]
    wanted += matching(model, COMPANIONS)
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


def _due(floats: Checkpoint, config: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> set[str]:
    """The weights with two wide dimensions in as many layers as config.json says, unless a name or a rule excepts them."""
    depth, due = dimensions(config).layers, set()
    for name in floats.names:
        layer = name.removesuffix(".weight")
        rule = next((rule for rule in rules if fnmatchcase(layer, rule["match"])), {})
        if is_due(name, floats.info(name).shape, depth) and not rule.get("skip"):
            due.add(layer)
    return due


def _missed_faults(due: set[str], layers: Mapping[str, Any], expected: Sequence[str]) -> list[str]:
    missed = sorted(due - set(layers) - set(expected))  # those in both are reported as not quantized
    if not missed:
        return []
    return [f"{len(missed)} weights of the decoder layers stayed float, although no rule says so: {some(missed)}"]


def _router_faults(floats: Checkpoint, config: Mapping[str, Any], layers: Mapping[str, Any]) -> list[str]:
    """Quantized linears with one output for each expert, beside the experts: routers, whatever they are called."""
    experts = dimensions(config).experts
    routers = [
        layer for layer in layers
        if experts is not None and f"{layer}.weight" in floats.names and not _EXPERT.search(layer)
        and floats.info(f"{layer}.weight").shape[0] == experts and _is_beside_experts(layer, floats, experts)
    ]  # fmt: skip
    return [f"{len(routers)} routers were quantized: {some(routers)}"] if routers else []


def _is_beside_experts(layer: str, floats: Checkpoint, experts: int) -> bool:
    """Whether the nearest module around a linear that holds other weights, too, holds the experts."""
    place = numbered(layer)
    inside = place[2].split(".") if place else []
    while len(inside) > 1:
        inside.pop()
        around = f"{place[0]}.{place[1]}.{'.'.join(inside)}." if place else ""
        beside = [name for name in floats.names if name.startswith(around) and not name.startswith(f"{layer}.")]
        shapes = [floats.info(name).shape for name in beside if is_wide(floats.info(name).shape)]
        if shapes:
            return any(_EXPERT.search(name) for name in beside) or any(shape[0] == experts for shape in shapes)
    return False


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
