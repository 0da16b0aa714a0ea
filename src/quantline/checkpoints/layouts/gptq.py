"""GPTQ v1: the layout of AutoGPTQ (``checkpoint_format: gptq``), Frantar et al. 2022, arXiv:2210.17323.

``w = (u - z) * s`` at 2, 3, 4 or 8 bits, with the group of every input column in g_idx.

Tensors of a layer:
    qweight  int32 (in*b/32, out)      codes, packed along in
    qzeros   int32 (in/g, out*b/32)    z - 1, packed along out
    scales   float16/32 (in/g, out)    in the dtype of the model
    g_idx    int32 (in,)               group of every input column; i // g if it is absent
    bias     float16/32 (out,)         optional

Bit order: sequential, low bits first; at 3 bits 32 values fill 3 words and values 10 and 21 straddle (see `packing`),
in qweight and in qzeros alike.

z = 0 is stored as ``(0 - 1) & mask``, all ones, and read back as 0. Readers differ: some add 1 and do not
mask, and get 2**b. Prefer gptq_v2 for layers with a zero point of 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts import gptq_config
from quantline.checkpoints.layouts.affine import AffineLinear, Grid, group_count, sequential_groups
from quantline.checkpoints.layouts.checks import Tensors, as_float, bias_of, check_shape, check_suffixes
from quantline.checkpoints.layouts.layout import (
    Affine,
    Bands,
    ConfigSection,
    Fault,
    Layout,
    Shape,
    Storage,
    groups_of,
    sizes_of,
    weights_of,
    word_faults,
)
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.packing import pack, unpack, values_per_run
from quantline.checkpoints.safetensors_stream import TensorSpec

NAME = "gptq"
CODES = "qweight"

# suffix -> required
TENSORS: Mapping[str, bool] = {"qweight": True, "qzeros": True, "scales": True, "g_idx": False, "bias": False}


def read(tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged.

    Raises:
        FormatError: tensors are missing or unknown, shapes disagree, or bits do not fit the words.
    """
    return read_stored(tensors, bits=bits, group_size=group_size, subtracted=1)


def write(linear: AffineLinear) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix; g_idx is always written.

    Raises:
        FormatError: in or out does not fill whole 32-bit words.
    """
    return write_stored(linear, subtracted=1)


def read_grid(tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int) -> Grid:
    """Read everything but the codes of a layer of ``shape`` (in, out); raises what `read` raises."""
    return read_stored_grid(tensors, shape, bits=bits, group_size=group_size, subtracted=1)


def write_grid(grid: Grid) -> dict[str, NDArray[Any]]:
    """Write everything but the codes; raises what `write` raises."""
    return write_stored_grid(grid, subtracted=1)


def read_stored(tensors: Tensors, *, bits: int, group_size: int, subtracted: int) -> AffineLinear:
    """Read a layer whose qzeros hold ``(z - subtracted) & mask``."""
    check_suffixes(tensors, TENSORS)
    codes = unpack(tensors[CODES], bits, axis=0)  # (in, out)
    grid = read_stored_grid(tensors, codes.shape, bits=bits, group_size=group_size, subtracted=subtracted)
    return AffineLinear(codes, grid.scales, grid.zeros, grid.group_index, bits, group_size, bias_of(tensors))


def read_stored_grid(tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int, subtracted: int) -> Grid:
    """Read everything but the codes of such a layer of ``shape`` (in, out)."""
    in_features, out_features = shape
    groups = group_count(in_features, group_size)
    _check_widths(in_features, out_features, bits)
    check_shape("qzeros", tensors["qzeros"], (groups, out_features * bits // 32))
    check_shape("scales", tensors["scales"], (groups, out_features))
    group_index = sequential_groups(in_features, group_size)
    if "g_idx" in tensors:
        check_shape("g_idx", tensors["g_idx"], (in_features,))
        if tensors["g_idx"].dtype not in (np.int32, np.int64):
            raise FormatError(f"g_idx is {tensors['g_idx'].dtype}: this layout stores int32; the checkpoint is corrupt")
        group_index = tensors["g_idx"].astype(np.int32)
    stored = unpack(tensors["qzeros"], bits, axis=1).astype(np.int16)  # (groups, out)
    return Grid(
        scales=as_float("scales", tensors["scales"]),
        zeros=(stored + np.int16(subtracted)) & np.int16(2**bits - 1),
        group_index=group_index,
        bits=bits,
        group_size=group_size,
    )


def write_stored(linear: AffineLinear, *, subtracted: int) -> dict[str, NDArray[Any]]:
    """Write a layer with ``(z - subtracted) & mask`` in qzeros."""
    partners = write_stored_grid(linear.grid, subtracted=subtracted)
    tensors: dict[str, NDArray[Any]] = {CODES: pack(linear.codes, linear.bits, axis=0), **partners}
    if linear.bias is not None:
        tensors["bias"] = linear.bias.copy()
    return tensors


def write_stored_grid(grid: Grid, *, subtracted: int) -> dict[str, NDArray[Any]]:
    """Write everything but the codes of such a layer."""
    _check_widths(grid.in_features, grid.out_features, grid.bits)
    stored = (grid.zeros - np.int16(subtracted)) & np.int16(2**grid.bits - 1)
    return {
        "qzeros": pack(stored.astype(np.uint8), grid.bits, axis=1),
        "scales": grid.scales.copy(),
        "g_idx": grid.group_index.copy(),
    }


def _check_widths(in_features: int, out_features: int, bits: int) -> None:
    for name, width in (("in_features", in_features), ("out_features", out_features)):
        if width * bits % 32:
            raise FormatError(
                f"{name}={width} does not fill whole 32-bit words at {bits} bits: it must be a multiple of "
                f"{values_per_run(bits)}; leave the layer unquantized"
            )


def specs(shape: Shape, spec: LinearSpec, storage: Storage) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that `write` gives."""
    (rows, columns), groups = shape, groups_of(shape, spec)
    return {
        "qweight": TensorSpec("I32", (rows * spec.bits // 32, columns)),
        "qzeros": TensorSpec("I32", (groups, columns * spec.bits // 32)),
        "scales": TensorSpec(storage.scale_dtype, (groups, columns)),
        "g_idx": TensorSpec("I32", (rows,)),
    }


def shape_of(tensors: Tensors, bits: int) -> Shape:
    """(in, out), from headers."""
    words, columns = sizes_of(tensors[CODES])
    return words * 32 // bits, columns


def faults(layout: str, shape: Shape, spec: LinearSpec, _storage: Storage) -> list[Fault]:
    """Faults of widths that do not fill whole words."""
    return word_faults(layout, shape, values_per_run(spec.bits))


def nearest(specs: Collection[LinearSpec], symmetric: bool, reordered: bool) -> str | None:
    """compressed-tensors for what vLLM does not read as GPTQ: other bits, zero points, other groups (0.32, `TYPE_MAP`).

    Reordered groups stay: it reads those in neither.
    """
    read = symmetric and all(spec.bits in (4, 8) and spec.group_size in (-1, 32, 64, 128) for spec in specs)
    return None if read or reordered else "compressed_tensors"


LAYOUT = Layout(
    name=NAME,
    method=gptq_config.METHOD,
    tensors=TENSORS,
    codes=CODES,
    scales=("scales",),
    zeros=("qzeros",),
    specs=specs,
    shape=shape_of,
    faults=partial(faults, NAME),
    dequantize=weights_of(read),
    affine=Affine(read, write, half_scales=True, bands=Bands("along", read_grid, write_grid)),
    config=ConfigSection(partial(gptq_config.describe, NAME), gptq_config.parse, own_file=gptq_config.OWN_FILE),
    mixed=True,
    desc_act=True,
    target="gptq",
    nearest=nearest,
    zero_hazard="which some readers of gptq mistake; gptq_v2 is safe",
)
