"""AWQ GEMV: the layout of AutoAWQ's ``version: gemv``.

``w = (u - z) * s``, 4 bits, groups of consecutive input columns, zero points stored as they are.

Tensors of a layer, output rows first:
    qweight  int32 (out, in/8)       codes, packed along in
    qzeros   int32 (out, W)          zero points, packed along groups, padded with zeros
    scales   float16 (out, 8*W)      padded with zeros
    bias     float16 (out,)          optional
with W = ceil(in/g / 8), rounded up to a multiple of 1, 2, 4 for g >= 128, 64, 32 (other sizes do not exist).

Bit order: sequential, nibble k (bits 4k .. 4k+3) of a word holds element k of its eight. The kernel is that of AWQ
(Lin et al. 2023, arXiv:2306.00978). One group over the whole input (-1) counts as g = in.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts import awq, awq_gemm
from quantline.checkpoints.layouts.affine import AffineLinear, group_count, sequential_groups
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
    ConfigSection,
    Fault,
    Layout,
    Shape,
    Storage,
    sizes_of,
    weights_of,
)
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.packing import pack, unpack
from quantline.checkpoints.safetensors_stream import TensorSpec

NAME = "awq_gemv"

# suffix -> required
TENSORS: Mapping[str, bool] = {"qweight": True, "qzeros": True, "scales": True, "bias": False}


def zeros_width(in_features: int, group_size: int) -> int:
    """Words per row of qzeros (W above).

    Raises:
        FormatError: the kernels have no padding rule for the group size.
    """
    size = in_features if group_size == -1 else group_size
    multiple = 1 if size >= 128 else {64: 2, 32: 4}.get(size)
    if multiple is None:
        raise FormatError(f"group size {size}: awq_gemv stores 32, 64, or 128 and above; use awq_gemm")
    width = -(-group_count(in_features, group_size) // 8)
    return -(-width // multiple) * multiple


def read(tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged.

    Raises:
        FormatError: tensors are missing or unknown, shapes disagree, padding is not zero, or bits are not 4.
    """
    check_suffixes(tensors, TENSORS)
    if bits != 4:
        raise FormatError(f"bits={bits}: awq_gemv stores 4 bits only; check the checkpoint's config")
    codes = unpack(tensors["qweight"], bits, axis=1)  # (out, in)
    out_features, in_features = codes.shape
    groups = group_count(in_features, group_size)
    width = zeros_width(in_features, group_size)
    check_shape("qzeros", tensors["qzeros"], (out_features, width))
    check_shape("scales", tensors["scales"], (out_features, 8 * width))
    zeros = unpack(tensors["qzeros"], bits, axis=1)  # (out, 8*W)
    scales = as_float("scales", tensors["scales"])
    if zeros[:, groups:].any() or scales[:, groups:].any():
        raise FormatError(
            f"the padding after {groups} groups is not zero: check group_size={group_size} against the config"
        )
    return AffineLinear(
        codes=codes.T,
        scales=np.ascontiguousarray(scales[:, :groups].T),
        zeros=np.ascontiguousarray(zeros[:, :groups].T.astype(np.int16)),
        group_index=sequential_groups(in_features, group_size),
        bits=bits,
        group_size=group_size,
        bias=bias_of(tensors),
    )


def write(linear: AffineLinear) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix.

    Raises:
        FormatError: bits other than 4, reordered groups, widths not multiples of 8, a group size without a padding
            rule, scales or bias beyond float16.
    """
    check_awq(linear.grid)
    columns = 8 * zeros_width(linear.in_features, linear.group_size)
    zeros = np.zeros((linear.out_features, columns), dtype=np.uint8)
    zeros[:, : linear.groups] = linear.zeros.T
    scales = np.zeros((linear.out_features, columns), dtype=np.float16)
    scales[:, : linear.groups] = to_half("scales", linear.scales, "round them first (round_scales), or use gptq").T
    tensors: dict[str, NDArray[Any]] = {
        "qweight": pack(linear.codes.T, 4, axis=1),
        "qzeros": pack(zeros, 4, axis=1),
        "scales": scales,
    }
    if linear.bias is not None:
        tensors["bias"] = to_half("bias", linear.bias, "round it first, or use gptq")
    return tensors


def specs(shape: Shape, spec: LinearSpec, _storage: Storage) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that `write` gives."""
    (in_features, out_features), words = shape, zeros_width(shape[0], spec.group_size)
    return {
        "qweight": TensorSpec("I32", (out_features, in_features // 8)),
        "qzeros": TensorSpec("I32", (out_features, words)),
        "scales": TensorSpec("F16", (out_features, 8 * words)),
    }


def shape_of(tensors: Tensors, _bits: int) -> Shape:
    """(in, out), from headers."""
    out_features, words = sizes_of(tensors["qweight"])
    return 8 * words, out_features


def faults(shape: Shape, spec: LinearSpec, storage: Storage) -> list[Fault]:
    """Faults of all AWQ layouts, and of group sizes without a padding rule."""
    found = awq.faults(NAME, shape, spec, storage)
    try:
        zeros_width(shape[0], spec.group_size)
    except FormatError as error:
        fact, _, remedy = str(error).partition("; ")
        found.append(Fault("groups", fact, remedy or "use another group size"))
    return found


LAYOUT = Layout(
    name=NAME,
    method=awq.METHOD,
    tensors=TENSORS,
    codes="qweight",
    scales=("scales",),
    zeros=("qzeros",),
    specs=specs,
    shape=shape_of,
    faults=faults,
    dequantize=weights_of(read),
    affine=Affine(read, write, rows_are_outputs=True, half_scales=True),
    config=ConfigSection(partial(awq.describe, NAME), awq.parse, old_file=awq.OLD_FILE),
    nearest=lambda _specs, _symmetric, _reordered: awq_gemm.NAME,
)
