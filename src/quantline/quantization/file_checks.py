"""What the files of a quantized checkpoint say about it, without decoding a weight: NumPy and headers only.

Every fault that is found is reported, so that one run tells all of them.
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
from quantline.core.errors import UserError
from quantline.core.files import read_json

# Tables that older checkpoints hold and that models compute anew: angles of rotary embeddings, causal masks.
_BUFFERS = re.compile(r"(?:inv_freq|masked_bias|attn\.bias|attention\.bias)$")
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass
class Files:
    """What was found.

    faults: what no result may have. warnings: what is worth knowing. linears: name -> (in_features, out_features) of those
    that are quantized, as in the float model. stored_bits: bits of all tensors that stand for them, biases left out, by
    name. zero_scales: scales that are zero, in all. weights, bits: number of weights and of bits in the whole model.
    """

    faults: list[str] = field(default_factory=list)
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
        """Bits of a quantized weight, with its share of scales, zero points and indexes."""
        return sum(self.stored_bits.values()) / max(self.quantized_weights, 1)


def inspect(model: Path, output: Path, expected: Sequence[str]) -> Files:
    """Look at a quantized checkpoint beside the float model that it was made of.

    Args:
        model: folder of the float model.
        output: folder of the quantized one.
        expected: names of the linears that should be quantized.
    """
    found = Files()
    floats = Checkpoint.open(model)
    found.weights = sum(math.prod(floats.info(name).shape) for name in floats.names)
    _companions(found, model, output)
    try:
        checkpoint, info = Checkpoint.open(output), quantization_of(output)
        layers = quantized_layers(checkpoint, info)
    except UserError as error:  # a shard is missing or cut off, an index names what is not there, a layer is incomplete
        found.faults.append(str(error))
        return found
    found.bits = 8 * sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    if not layers:
        found.faults.append("nothing was quantized: every weight is as it was")
        return found
    left = [name for name in expected if name not in layers]
    if left:
        found.faults.append(f"{len(left)} of {len(expected)} linears were not quantized: {some(left)}")
    extra = [name for name in layers if name not in set(expected)]
    if extra:
        found.faults.append(f"{len(extra)} linears were quantized and should have stayed float: {some(extra)}")
    for name, suffixes in layers.items():
        if f"{name}.weight" not in floats.names:
            found.faults.append(f"{name} is quantized, and no linear of the float model")
            continue
        tall, wide = floats.info(f"{name}.weight").shape
        found.linears[name] = int(wide), int(tall)
        own = [tensor for suffix, tensor in suffixes.items() if suffix != "bias"]
        found.stored_bits[name] = 8 * sum(checkpoint.info(tensor).nbytes for tensor in own)
    _absent(found, floats, checkpoint, layers, tied=bool(read_json(model / "config.json").get("tie_word_embeddings")))
    if info is not None:
        _scales(found, checkpoint, layers, LAYOUTS[info.layout].scales)
    return found


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _companions(found: Files, model: Path, output: Path) -> None:
    wanted = ["config.json"]
    wanted += [path.name for path in sorted(model.iterdir()) if any(fnmatch(path.name, like) for like in COMPANIONS)]
    missing = [name for name in wanted if not (output / name).exists()]
    if missing:
        found.faults.append(f"lacks {some(missing)}, which the float model has")
    empty = [name for name in wanted if (output / name).is_file() and not (output / name).stat().st_size]
    empty = [name for name in empty if (model / name).stat().st_size]
    if empty:
        found.faults.append(f"{some(empty)}: empty")


def _absent(
    found: Files, floats: Checkpoint, checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, str]], *, tied: bool
) -> None:
    names = set(checkpoint.names)
    missing = [
        name for name in floats.names
        if name not in names and name.removesuffix(".weight") not in layers
        and not (tied and name == f"{LM_HEAD}.weight") and not _BUFFERS.search(name)
    ]  # fmt: skip
    if missing:
        found.faults.append(f"{len(missing)} tensors of the float model are gone: {some(missing)}")


def _scales(
    found: Files, checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, str]], scales: Sequence[str]
) -> None:
    unsound, dead, partly = [], [], []
    for layer, suffixes in layers.items():
        for suffix, name in suffixes.items():
            if suffix not in scales or checkpoint.info(name).dtype not in _FLOATS:
                continue
            values = to_float32(checkpoint.tensor(name))
            zeros = int((values == 0).sum())
            found.scales += values.size
            found.zero_scales += zeros
            if not np.isfinite(values).all():
                unsound.append(layer)
            elif zeros == values.size:
                dead.append(layer)
            elif zeros:
                partly.append(layer)
    if unsound:
        found.faults.append(f"scales that are NaN or infinite in {len(unsound)} linears: {some(unsound)}")
    if dead:
        found.faults.append(
            f"nothing but zero scales, so nothing but zero weights, in {len(dead)} linears: {some(dead)}"
        )
    if partly:
        found.warnings.append(
            f"{found.zero_scales} of {found.scales} scales are zero, and their weights with them, in {some(partly)}"
        )
