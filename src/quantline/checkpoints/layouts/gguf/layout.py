"""The layout `gguf`: one file, each tensor in a block type of its own, read as weights and kept as it is.

A linear X has the rows of its blocks as uint8 (out, bytes) in the tensor `X.q4_k`, named after its type (`names`). The file
also has the embeddings, and the output layer, in block types. config.json names the file's mixture:

    {"quant_method": "gguf", "type": "Q4_K_M", "imatrix": true, "file": "model.gguf"}

and the types, bits and groups of linears are those of the file itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.checks import Tensors
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES, BlockType, dequantized
from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.checkpoints.layouts.gguf.mixtures import MIXTURES
from quantline.checkpoints.layouts.gguf.names import parameters
from quantline.checkpoints.layouts.layout import ConfigSection, Fault, Layout, Shape, Storage, sizes_of
from quantline.checkpoints.layouts.linear_spec import LayerSettings, LinearSpec
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.core.errors import CheckpointError

NAME = "gguf"
FILE = "model.gguf"
SUFFIXES: Mapping[str, BlockType] = {name.lower(): kind for name, kind in BLOCK_TYPES.items()}
_TENSORS = {**dict.fromkeys(SUFFIXES, False), "bias": False}


def spec_of(kind: str) -> LinearSpec:
    """Bits and groups of a block type, with its name."""
    one = BLOCK_TYPES[kind]
    return LinearSpec(one.bits, one.group, kind.lower())


def _blocks(tensors: Tensors) -> tuple[BlockType, NDArray[Any]]:
    found = [suffix for suffix in tensors if suffix in SUFFIXES]
    if len(found) != 1:
        raise FormatError(
            f"has the blocks {', '.join(found) or 'of no type'}: a linear has one type; write the file again"
        )
    return SUFFIXES[found[0]], tensors[found[0]]


def dequantize(tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
    """The weights (out, in) of a linear's blocks; bits and groups are those of its type.

    Raises:
        FormatError: there are blocks of no type or of two, or no whole blocks.
    """
    del bits, group_size
    kind, rows = _blocks(tensors)
    return dequantized(kind, rows)


def _shape(tensors: Tensors, _bits: int) -> Shape:
    kind, rows = _blocks(tensors)
    high, wide = sizes_of(rows)
    return wide // kind.nbytes * kind.weights, high


def _specs(shape: Shape, spec: LinearSpec, _storage: Storage) -> dict[str, TensorSpec]:
    kind = SUFFIXES[spec.kind]
    return {spec.kind: TensorSpec("U8", (shape[1], shape[0] // kind.weights * kind.nbytes))}


def _faults(shape: Shape, spec: LinearSpec, _storage: Storage) -> list[Fault]:
    kind = SUFFIXES.get(spec.kind)
    if kind is None:
        return [Fault("bits", f"has {spec.bits} bits of no block type", "use method=gguf")]
    if shape[0] % kind.weights:
        fact = f"in_features={shape[0]} is no multiple of {kind.weights}, the block of {kind.name}"
        return [Fault("width", fact, "leave it in float")]
    return []


def _describe(wanted: Description) -> dict[str, Any]:
    kind = wanted.options.get("type")
    if kind not in MIXTURES:
        raise CheckpointError(f"gguf: no mixture {kind!r}; known are {', '.join(MIXTURES)}")
    return {"quant_method": NAME, "type": kind, "imatrix": bool(wanted.options.get("imatrix")), "file": FILE}


def _parse(path: Path, section: Mapping[str, Any]) -> QuantizationInfo:
    name, kind = section.get("file", FILE), section.get("type")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path}: file is {name!r}: it must be the name of a file beside config.json")
    usual = spec_of(MIXTURES[str(kind)][1]) if kind in MIXTURES else LinearSpec(4, 32)
    file = path.parent / name
    return _info(usual, settings_of(file, file.stat().st_mtime_ns) if file.is_file() else {})


def info_of(file: Path) -> QuantizationInfo:
    """The same of a file that no config.json describes.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _info(LinearSpec(4, 32), settings_of(file, file.stat().st_mtime_ns))


def _info(usual: LinearSpec, own: Mapping[str, LayerSettings]) -> QuantizationInfo:
    return QuantizationInfo(
        method=NAME, layout=NAME, bits=usual.bits, group_size=usual.group_size, desc_act=False, symmetric=True,
        modules_to_not_convert=(), overrides=own,
    )  # fmt: skip


@cache
def settings_of(file: Path, _changed: int) -> Mapping[str, LayerSettings]:
    """Bits and groups of every quantized module of a file."""
    found = {}
    for name in parameters(read_gguf(file)):
        module, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES:
            found[module] = LayerSettings(SUFFIXES[suffix].bits, SUFFIXES[suffix].group, True)
    return found


LAYOUT = Layout(
    name=NAME,
    method=NAME,
    tensors=_TENSORS,
    codes="",
    scales=(),
    specs=_specs,
    shape=_shape,
    faults=_faults,
    dequantize=dequantize,
    config=ConfigSection(_describe, _parse),
    mixed=True,
    whole=True,
    runtime="llamacpp",
)
