"""AWQ GEMM: the layout of AutoAWQ's ``version: gemm`` (also of its exllama versions, which repack at load time).

``w = (u - z) * s``, 4 bits, groups of consecutive input columns, zero points stored as they are.

Tensors of a layer:
    qweight  int32 (in, out/8)       codes, packed along out
    qzeros   int32 (in/g, out/8)     zero points, packed along out
    scales   float16 (in/g, out)
    bias     float16 (out,)          optional

Bit order: nibble k (bits 4k .. 4k+3) of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][k] of its eight columns. The
interleaving lets the GEMM kernel of AWQ (Lin et al. 2023, arXiv:2306.00978) unpack pairs into half2 registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts import awq
from quantline.checkpoints.layouts.affine import AffineLinear, Grid, group_count, sequential_groups
from quantline.checkpoints.layouts.checks import (
    Tensors,
    as_float,
    bias_of,
    check_awq,
    check_shape,
    check_suffixes,
    to_half,
)
from quantline.checkpoints.layouts.layout import (
    Affine,
    Bands,
    ConfigSection,
    Layout,
    Shape,
    Storage,
    groups_of,
    sizes_of,
    weights_of,
)
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.packing import pack, unpack
from quantline.checkpoints.safetensors_stream import TensorSpec

NAME = "awq_gemm"
CODES = "qweight"

# suffix -> required
TENSORS: Mapping[str, bool] = {"qweight": True, "qzeros": True, "scales": True, "bias": False}

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged.

    Raises:
        FormatError: tensors are missing or unknown, shapes disagree, or bits are not 4.
    """
    check_suffixes(tensors, TENSORS)
    if bits != 4:
        raise FormatError(f"bits={bits}: awq_gemm stores 4 bits only; check the checkpoint's config")
    codes = unpack(tensors["qweight"], bits, axis=1, order=ORDER)  # (in, out)
    grid = read_grid(tensors, codes.shape, bits=bits, group_size=group_size)
    return AffineLinear(codes, grid.scales, grid.zeros, grid.group_index, bits, group_size, bias_of(tensors))


def read_grid(tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int) -> Grid:
    """Read everything but the codes of a layer of ``shape`` (in, out).

    Raises:
        FormatError: shapes disagree.
    """
    in_features, out_features = shape
    groups = group_count(in_features, group_size)
    check_shape("qzeros", tensors["qzeros"], (groups, out_features // 8))
    check_shape("scales", tensors["scales"], (groups, out_features))
    return Grid(
        scales=as_float("scales", tensors["scales"]),
        zeros=unpack(tensors["qzeros"], bits, axis=1, order=ORDER).astype(np.int16),
        group_index=sequential_groups(in_features, group_size),
        bits=bits,
        group_size=group_size,
    )


def write(linear: AffineLinear) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix.

    Raises:
        FormatError: bits other than 4, reordered groups, widths not multiples of 8, scales or bias beyond float16.
    """
    partners = write_grid(linear.grid)
    tensors: dict[str, NDArray[Any]] = {CODES: pack(linear.codes, 4, axis=1, order=ORDER), **partners}
    if linear.bias is not None:
        tensors["bias"] = to_half("bias", linear.bias, "round it first, or use gptq")
    return tensors


def write_grid(grid: Grid) -> dict[str, NDArray[Any]]:
    """Write everything but the codes; raises what `write` raises."""
    check_awq(grid)
    return {
        "qzeros": pack(grid.zeros.astype(np.uint8), 4, axis=1, order=ORDER),
        "scales": to_half("scales", grid.scales, "round them first (round_scales), or use gptq"),
    }


def specs(shape: Shape, spec: LinearSpec, _storage: Storage) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that `write` gives."""
    (rows, columns), groups = shape, groups_of(shape, spec)
    return {
        "qweight": TensorSpec("I32", (rows, columns // 8)),
        "qzeros": TensorSpec("I32", (groups, columns // 8)),
        "scales": TensorSpec("F16", (groups, columns)),
    }


def shape_of(tensors: Tensors, _bits: int) -> Shape:
    """(in, out), from headers."""
    rows, words = sizes_of(tensors[CODES])
    return rows, 8 * words


LAYOUT = Layout(
    name=NAME,
    method=awq.METHOD,
    tensors=TENSORS,
    codes=CODES,
    scales=("scales",),
    zeros=("qzeros",),
    specs=specs,
    shape=shape_of,
    faults=partial(awq.faults, NAME),
    dequantize=weights_of(read),
    affine=Affine(read, write, half_scales=True, bands=Bands("across", read_grid, write_grid)),
    config=ConfigSection(partial(awq.describe, NAME), awq.parse, old_file=awq.OLD_FILE),
    target="awq",
)
