"""compressed-tensors ``pack-quantized``: the weight-only integer layout of llm-compressor, which vLLM serves.

``w = (u - z) * s`` at 2, 3, 4 or 8 bits; the library's signed codes are ``q = u - 2**(b-1)``, and it packs ``u``.

Tensors of a layer, output rows first:
    weight_packed      int32 (out, ceil(in*b/32))  codes, packed along in
    weight_scale       float16/32 (out, in/g)      (out, 1) per output channel; in the dtype of the model
    weight_shape       int64 (2,)                  (out, in): widths need not fill words
    weight_zero_point  int32 (ceil(out*b/32), in/g) zero points, packed along out; absent if all are 2**(b-1)
    weight_g_idx       int32 (in,)                 group of every input column; only with reordered groups
    bias               float16/32 (out,)           optional

Bit order: sequential, low bits first, dense: at 3 bits some values straddle words, as in GPTQ. The unused bits of a last
word are 0. Up to its version 0.17 the library put 10 values of 3 bits in a word; those are read, too, told by their number
of words; zero points are packed as the codes beside them. A g_idx that contains -1 was never filled in and means consecutive
groups. Source: the compressed-tensors package 0.19 (Apache-2.0), whose packing the tests compare with this one; vLLM 0.32
reads the same (CompressedTensorsWNA16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.affine import AffineLinear, Grid, group_count, sequential_groups
from quantline.checkpoints.layouts.checks import Tensors, as_float, bias_of, check_shape, check_suffixes
from quantline.checkpoints.layouts.compressed_tensors import config
from quantline.checkpoints.layouts.layout import (
    Affine,
    Bands,
    ConfigSection,
    Fault,
    Layout,
    Shape,
    Storage,
    bits_faults,
    groups_of,
    weights_of,
)
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.packing import BITS, pack, unpack
from quantline.checkpoints.safetensors_stream import TensorSpec

NAME = "compressed_tensors"
CODES = "weight_packed"
# Codes of 3 bits that the library put in a word before.
_FORMER = 10

# suffix -> required
TENSORS: Mapping[str, bool] = {
    "weight_packed": True,
    "weight_scale": True,
    "weight_shape": True,
    "weight_zero_point": False,
    "weight_g_idx": False,
    "bias": False,
}


def read(tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged. Missing zero points are 2**(b-1).

    Raises:
        FormatError: tensors are missing or unknown, shapes disagree, or bits do not fit the words.
    """
    check_suffixes(tensors, TENSORS)
    shape = tensors["weight_shape"]
    if shape.dtype not in (np.int64, np.int32) or shape.shape != (2,) or (shape < 1).any():
        raise FormatError(f"weight_shape is {shape.dtype} {shape.tolist()}: it must be two sizes (out, in)")
    out_features, in_features = (int(size) for size in shape)
    words = _words(in_features, bits, tensors[CODES].shape[-1])
    check_shape(CODES, tensors[CODES], (out_features, words))
    codes = _unpack(tensors[CODES], bits, in_features).T  # column-major, not copied
    former = words != _words(in_features, bits)
    grid = read_grid(tensors, codes.shape, bits=bits, group_size=group_size, former=former)
    return AffineLinear(codes, grid.scales, grid.zeros, grid.group_index, bits, group_size, bias_of(tensors))


def read_grid(tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int, former: bool = False) -> Grid:
    """Read everything but the codes of a layer of ``shape`` (in, out).

    former: zero points of 3 bits are in the library's former packing, also where both take as many words.

    Raises:
        FormatError: shapes disagree.
    """
    in_features, out_features = shape
    check_shape("weight_shape", tensors["weight_shape"], (2,))
    if tuple(tensors["weight_shape"]) != (out_features, in_features):
        raise FormatError(
            f"weight_shape is {tensors['weight_shape'].tolist()}, but the layer is {out_features, in_features}"
        )
    groups = group_count(in_features, group_size)
    check_shape("weight_scale", tensors["weight_scale"], (out_features, groups))
    zeros = np.full((groups, out_features), 2 ** (bits - 1), dtype=np.int16)
    if "weight_zero_point" in tensors:
        dense = _words(out_features, bits, tensors["weight_zero_point"].shape[0])
        words = -(-out_features // _FORMER) if former else dense
        check_shape("weight_zero_point", tensors["weight_zero_point"], (words, groups))
        packed = np.ascontiguousarray(tensors["weight_zero_point"].T)
        zeros = (_unpack_former(packed, out_features) if former else _unpack(packed, bits, out_features)).astype(
            np.int16
        )
    group_index = sequential_groups(in_features, group_size)
    if "weight_g_idx" in tensors:
        stored = tensors["weight_g_idx"]
        check_shape("weight_g_idx", stored, (in_features,))
        if stored.dtype not in (np.int32, np.int64):
            raise FormatError(f"weight_g_idx is {stored.dtype}: this layout stores int32; the checkpoint is corrupt")
        if not (stored == -1).any():
            group_index = stored.astype(np.int32)
    return Grid(
        scales=np.ascontiguousarray(as_float("weight_scale", tensors["weight_scale"]).T),
        zeros=zeros,
        group_index=group_index,
        bits=bits,
        group_size=group_size,
    )


def write(linear: AffineLinear, *, zero_points: bool | None = None) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix; weight_g_idx only if groups are reordered.

    Args:
        linear: the layer.
        zero_points: whether to write weight_zero_point. The config's ``symmetric`` holds for all layers of a group,
            so a checkpoint with one asymmetric layer needs them in every layer; None decides by this layer alone.

    Raises:
        FormatError: zero points are omitted but are not 2**(b-1).
    """
    partners = write_grid(linear.grid, zero_points=zero_points)
    tensors: dict[str, NDArray[Any]] = {CODES: _pack(linear.codes.T, linear.bits), **partners}
    if linear.bias is not None:
        tensors["bias"] = linear.bias.copy()
    return tensors


def write_grid(grid: Grid, *, zero_points: bool | None = None) -> dict[str, NDArray[Any]]:
    """Write everything but the codes; arguments and exceptions are those of `write`."""
    if zero_points is None:
        zero_points = not grid.symmetric
    if not zero_points and not grid.symmetric:
        raise FormatError("zero points differ from the middle one: write them, or call the checkpoint asymmetric")
    tensors: dict[str, NDArray[Any]] = {
        "weight_scale": np.ascontiguousarray(grid.scales.T),
        "weight_shape": np.array([grid.out_features, grid.in_features], dtype=np.int64),
    }
    if zero_points:
        tensors["weight_zero_point"] = np.ascontiguousarray(_pack(grid.zeros.astype(np.uint8), grid.bits).T)
    if not grid.sequential:
        tensors["weight_g_idx"] = grid.group_index.copy()
    return tensors


def _words(width: int, bits: int, stored: int = -1) -> int:
    """Words of a row of codes; as many as are `stored` if these are the library's former ones of 3 bits."""
    if bits not in BITS:
        raise FormatError(f"bits={bits}: codes are packed at 2, 3, 4 or 8 bits")
    dense, former = -(-width * bits // 32), -(-width // _FORMER)
    return former if bits == 3 and stored == former != dense else dense


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """uint8 (rows, width) -> int32 (rows, ceil(width*b/32))."""
    width = codes.shape[1]
    short = -width % 32
    if short:
        codes = np.pad(codes, ((0, 0), (0, short)))
    words = pack(codes, bits, axis=1)
    return words if not short else np.ascontiguousarray(words[:, : _words(width, bits)])


def _unpack(words: NDArray[Any], bits: int, width: int) -> NDArray[np.uint8]:
    """int32 (rows, ceil(width*b/32)) -> uint8 (rows, width)."""
    if bits == 3 and words.ndim == 2 and words.shape[1] != -(-width * 3 // 32):
        return _unpack_former(words, width)
    short = -words.shape[-1] % bits if bits == 3 else 0
    if short:
        words = np.pad(words, ((0, 0), (0, short)))
    codes = unpack(words, bits, axis=1)
    return codes if codes.shape[1] == width else np.ascontiguousarray(codes[:, :width])


def _unpack_former(words: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """Ten codes of 3 bits a word, its two top bits 0."""
    if words.dtype not in (np.int32, np.uint32):
        raise FormatError(f"packed words are {words.dtype} {words.shape}: this layout stores an int32 matrix")
    shifts = np.arange(_FORMER, dtype=np.uint32) * np.uint32(3)
    fields = np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts
    return np.ascontiguousarray((fields & np.uint32(7)).astype(np.uint8).reshape(words.shape[0], -1)[:, :width])


def specs(shape: Shape, spec: LinearSpec, storage: Storage) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that `write` gives."""
    (in_features, out_features), groups = shape, groups_of(shape, spec)
    found = {
        "weight_packed": TensorSpec("I32", (out_features, _words(in_features, spec.bits))),
        "weight_scale": TensorSpec(storage.scale_dtype, (out_features, groups)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    if storage.zero_points:
        found["weight_zero_point"] = TensorSpec("I32", (_words(out_features, spec.bits), groups))
    if not storage.sequential:
        found["weight_g_idx"] = TensorSpec("I32", (in_features,))
    return found


def shape_of(tensors: Tensors, _bits: int) -> Shape:
    """(in, out), from weight_shape."""
    out_features, in_features = (int(size) for size in tensors["weight_shape"].reshape(-1)[:2])
    return in_features, out_features


def faults(_shape: Shape, spec: LinearSpec, _storage: Storage) -> list[Fault]:
    """Faults of bits that cannot be packed; every width is possible."""
    return bits_faults("compressed-tensors", BITS, spec)


LAYOUT = Layout(
    name=NAME,
    method=config.METHOD,
    tensors=TENSORS,
    codes=CODES,
    scales=("weight_scale",),
    zeros=("weight_zero_point",),
    specs=specs,
    shape=shape_of,
    faults=faults,
    dequantize=weights_of(read),
    affine=Affine(
        read, write, rows_are_outputs=True, optional_zeros=True, casts_at_loading=True,
        bands=Bands("flat", read_grid, write_grid),
    ),
    config=ConfigSection(partial(config.section, activations=None), config.info_of, names_tied_head=True),
    mixed=True,
    mixed_target=True,
    target="compressed_tensors",
)  # fmt: skip

# The same tensors, for kernels that round inputs to FP8 (W4AFP8).
W4AFP8 = replace(
    LAYOUT, name="compressed_tensors_w4afp8", target=None, mixed=False, mixed_target=False, activations=True,
    config=ConfigSection(partial(config.section, activations=config.FP8), config.info_of, names_tied_head=True),
)  # fmt: skip
