"""EXL3, the format of ExLlamaV3: trellis codes under Hadamard transforms. Read as weights, never written.

Tensors of a linear, K bits a weight, both widths multiples of 128:

    trellis   I16 (in/16, out/16, 16*K)   tiles of 16 x 16 weights
    suh, svh  F16 (in,), (out,)           scales of the input and output channels
    mcg, mul1 I32 ()                      which code book, by its multiplier; neither is the first one, `3inst`
    bias      as in a float linear        optional

A tile's words, each pair of them exchanged, are a ring of 256*K bits. The code of weight i is the 16 bits of the ring that
end with bit (i+1)*K, so neighbours share all but K bits. A code book makes a float of each code by a multiplication:

    3inst   c * 89226354 + 64248484;   sum of both halves of the word, masked to sign, low exponents and mantissa
    mcg     c * 0xCBAC1FED;            likewise
    mul1    c * 0x83DCD12D;            sum of the four bytes, scaled

The weights of a tile lie in the order of a tensor core's fragments. With H the Hadamard matrix of 128, scaled to be
orthogonal, and D the decoded matrix (in, out): weight = diag(suh) H D H diag(svh), H on each 128 rows and columns.

Codes become floats in float32, the transforms are computed in float64 and rounded once; GPTQModel computes them in float32,
the kernels of ExLlamaV3 in float16 and float32. Each linear has bits of its own, which its trellis says. ExLlamaV3 stores an
output layer of its own, also where config.json ties it to the embeddings. Source: GPTQModel 7.6,
nn_modules/exllamav3_torch.py, and ExLlamaV3 1.6.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.checks import Tensors, check_shape, check_suffixes
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.layout import ConfigSection, Fault, Layout, Shape, Storage, bits_faults, sizes_of
from quantline.checkpoints.layouts.linear_spec import LayerSettings, LinearSpec
from quantline.checkpoints.safetensors_file import read_header
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.core.errors import CheckpointError

NAME = "exl3"
BITS = range(1, 9)
_TILE, _BLOCK = 16, 128
_TENSORS: Mapping[str, bool] = {
    "trellis": True, "suh": True, "svh": True, "mcg": False, "mul1": False, "bias": False,
}  # fmt: skip
_MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
# Tiles decoded at a time; limits the temporaries to some 50 MB.
_TILES = 1 << 14


def dequantize(tensors: Tensors, *, bits: int, group_size: int = -1) -> NDArray[np.float32]:
    """One linear's weight, float32 (out, in).

    Args:
        tensors: by suffix, in the dtypes of the file.
        bits: of a code; the trellis must have as many.
        group_size: not used; there are no groups.

    Raises:
        FormatError: the tensors do not fit the layout.
    """
    del group_size
    check_suffixes(tensors, _TENSORS)
    trellis = tensors["trellis"]
    wide, high = _shape(tensors, bits)
    if trellis.dtype != np.int16 or trellis.ndim != 3 or trellis.shape[2] != _TILE * bits or bits not in BITS:
        raise FormatError(
            f"trellis is {trellis.dtype} {trellis.shape}: EXL3 with {bits} bits has int16 (in/16, out/16, {_TILE * bits})"
        )
    if wide % _BLOCK or high % _BLOCK:
        raise FormatError(f"trellis is of {wide} inputs and {high} outputs: EXL3 needs multiples of {_BLOCK}")
    scales = []
    for name, width in (("suh", wide), ("svh", high)):
        check_shape(name, tensors[name], (width,))
        scales.append(tensors[name].astype(np.float64))
    book = _codebook(_book_of(tensors))
    tiles = trellis.reshape(-1, _TILE * bits)
    values = np.empty((len(tiles), _TILE * _TILE), np.float32)
    for start in range(0, len(tiles), _TILES):
        values[start : start + _TILES] = book[_codes(tiles[start : start + _TILES], bits)][:, _places()]
    matrix = values.reshape(wide // _TILE, high // _TILE, _TILE, _TILE).swapaxes(1, 2).reshape(wide, high)
    return _transformed(matrix, *scales)


def _book_of(tensors: Tensors) -> str:
    named = [name for name in _MULTIPLIERS if name in tensors]
    if len(named) > 1:
        raise FormatError("mcg and mul1 are both there: a linear has one code book; fetch the checkpoint again")
    for name in named:
        marker = np.asarray(tensors[name]).reshape(-1)
        if marker.size != 1 or int(marker[0]) & 0xFFFFFFFF != _MULTIPLIERS[name]:
            raise FormatError(f"{name} is {marker[:2]}: the multiplier of this code book is {_MULTIPLIERS[name]:#x}")
    return named[0] if named else "3inst"


def _codes(tiles: NDArray[np.int16], bits: int) -> NDArray[np.uint16]:
    """The 16 bits of each weight, (tiles, 256), in the order of the ring."""
    words = tiles.view(np.uint16).reshape(len(tiles), -1, 2)[:, :, ::-1].reshape(len(tiles), -1)
    ends = (np.arange(_TILE * _TILE) + 1) * bits
    last = (ends - 1) // 16  # the word that the code ends in; its first bits may be in the one before
    pairs = words[:, last - 1].astype(np.uint32) << np.uint32(16) | words[:, last]
    return (pairs >> (16 * (last + 1) - ends).astype(np.uint32)).astype(np.uint16)


@cache
def _codebook(name: str) -> NDArray[np.float32]:
    """The float of each code, float32 (65536,)."""
    code = np.arange(1 << 16, dtype=np.uint64)
    if name == "mul1":
        product = (code * _MULTIPLIERS[name] & 0xFFFFFFFF).astype("<u4")
        total = product.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.uint16)
        # The sum is the mantissa of a half between 1024 and 2048.
        factor, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float32)
        mantissas = (total + np.uint16(0x6400)).view(np.float16).astype(np.float32)
        scaled: NDArray[np.float32] = mantissas * factor + shift
        return scaled
    product = code * _MULTIPLIERS[name] if name in _MULTIPLIERS else code * 89226354 + 64248484
    word = (product & 0x8FFF8FFF ^ 0x3B603B60).astype("<u4")
    halves = word.view("<f2").reshape(-1, 2).astype(np.float32)
    found: NDArray[np.float32] = halves[:, 0] + halves[:, 1]
    return found


@cache
def _places() -> NDArray[np.int64]:
    """Where in the ring each weight of a tile is, row by row: (256,).

    Lane t of a warp holds 8 weights: rows 2(t%4) + {0, 1, 8, 9} of column t//4, then of column t//4 + 8.
    """
    lane, own = np.divmod(np.arange(_TILE * _TILE), 8)
    row = 2 * (lane % 4) + np.array([0, 1, 8, 9])[own % 4]
    column = lane // 4 + 8 * (own // 4)
    return np.argsort(row * _TILE + column)


@cache
def _hadamard() -> NDArray[np.float64]:
    matrix: NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < _BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(_BLOCK)
    return matrix


def _transformed(matrix: NDArray[np.float32], suh: NDArray[Any], svh: NDArray[Any]) -> NDArray[np.float32]:
    """The weight (out, in), some columns of 128 outputs at a time."""
    wide, high = matrix.shape
    transform = _hadamard()
    weight = np.empty((high, wide), np.float32)
    for start in range(0, high, _BLOCK):
        columns = matrix[:, start : start + _BLOCK].astype(np.float64) @ transform
        columns = (transform @ columns.reshape(-1, _BLOCK, _BLOCK)).reshape(wide, _BLOCK)
        weight[start : start + _BLOCK] = (columns * suh[:, None] * svh[start : start + _BLOCK]).T
    return weight


def parse(path: Path, section: Mapping[str, Any]) -> QuantizationInfo:
    """Read a description; the bits of each linear are in the headers of the weights beside it.

    Raises:
        CheckpointError: `bits` is no number from 1 to 8, or the header of a file of weights is damaged.
    """
    bits = section.get("bits")
    if not isinstance(bits, int | float) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise CheckpointError(f"{path}: bits is {bits!r}: EXL3 has 1 to 8; restore the file")
    own = {
        name.removesuffix(".trellis"): LayerSettings(info.shape[-1] // _TILE, -1, True)
        for file in sorted(path.parent.glob("*.safetensors"))
        for name, info in read_header(file).items()
        if name.endswith(".trellis") and info.shape
    }
    return QuantizationInfo(
        method=NAME, layout=NAME, bits=round(bits), group_size=-1, desc_act=False, symmetric=True,
        modules_to_not_convert=(), overrides=own,
    )  # fmt: skip


def _describe(_wanted: Description) -> dict[str, Any]:
    raise CheckpointError("EXL3 is read and kept, not written; use gguf, gptq or compressed_tensors")


def _specs(shape: Shape, spec: LinearSpec, _storage: Storage) -> dict[str, TensorSpec]:
    wide, high = shape
    return {
        "trellis": TensorSpec("I16", (wide // _TILE, high // _TILE, _TILE * spec.bits)), "suh": TensorSpec("F16", (wide,)),
        "svh": TensorSpec("F16", (high,)), "mcg": TensorSpec("I32", ()),
    }  # fmt: skip


def _shape(tensors: Tensors, _bits: int) -> Shape:
    rows, columns = sizes_of(tensors["trellis"])
    return rows * _TILE, columns * _TILE


def _faults(shape: Shape, spec: LinearSpec, _storage: Storage) -> list[Fault]:
    return bits_faults("EXL3", BITS, spec) + [
        Fault("width", f"{name}={width} is no multiple of {_BLOCK}, which EXL3 needs", "leave it in float")
        for name, width in zip(("in_features", "out_features"), shape, strict=True)
        if width % _BLOCK
    ]


LAYOUT = Layout(
    name=NAME, method=NAME, tensors=_TENSORS, codes="trellis", scales=("suh", "svh"), specs=_specs, shape=_shape,
    faults=_faults, dequantize=dequantize, config=ConfigSection(_describe, parse), mixed=True, own_head=True,
)  # fmt: skip
