"""msModelSlim (Ascend) W4A16 and W8A16: signed codes, and offsets that may lie outside the range of codes.

``w = (q - offset) * s``, groups of g consecutive input columns. `AffineLinear` has ``u = q + 2**(b-1)`` and
``z = offset + 2**(b-1)``; codes and zero points are exact or refused, scales are kept unchanged.

Tensors of a layer, output rows first:
    weight         int8 (out, in)          q, one per byte
                   int8 (out/2, in)        packed, per group: rows 2r (low nibble) and 2r+1 (high) share row r
                   int8 (out, in/2)        packed, per channel: columns 2c (low) and 2c+1 (high) share column c
    weight_scale   float (out, in/g)       also (out*in/g, 1), row-major; per channel (out, 1) or (out,)
    weight_offset  float, as weight_scale  integral
    bias           float (out,)            optional

Packed means W4A16 as ``ascendV1`` saves it, nibbles in two's complement. Floats are float32, float16 or bfloat16.
Source: runs of the public msModelSlim repository.

Offsets follow ``round(-min/s) - 2**(b-1)`` and leave the code range in groups whose weights all have one sign. Such a
group has no exact unsigned zero point: `read` refuses it, `read_with_outliers` requantizes and reports it.
A group of zeros is stored with scale 0 and offset NaN (0/0), and is restored exactly. A group of another constant is
stored with scale 0 and an infinite offset: its value is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.affine import AffineLinear, group_count, sequential_groups, transposed
from quantline.checkpoints.layouts.checks import Tensors, as_float, bias_of, check_shape, check_suffixes
from quantline.checkpoints.layouts.msmodelslim.outliers import OutlierReport, requantize
from quantline.checkpoints.layouts.packing import turned

__all__ = [
    "BITS", "NAME", "TENSORS", "Geometry", "OutlierReport", "check_range", "geometry", "read", "read_with_outliers", "write",
]  # fmt: skip

NAME = "msmodelslim"
BITS = (4, 8)

# suffix -> required
TENSORS: Mapping[str, bool] = {"weight": True, "weight_scale": True, "weight_offset": True, "bias": False}


@dataclass(frozen=True)
class Geometry:
    """Widths, group size and packing of a layer, from the shapes of its tensors.

    Attributes:
        out_features, in_features: of the linear.
        group_size: input columns per group; -1 for one scale per output channel.
        packed: two codes per byte, along out if group_size is positive, along in for -1.
    """

    out_features: int
    in_features: int
    group_size: int
    packed: bool


def geometry(weight: tuple[int, ...], scale: tuple[int, ...], packed: bool) -> Geometry:
    """Widths and group size from the shapes of weight and weight_scale.

    Args:
        weight, scale: the shapes.
        packed: whether the save mode packs two codes per byte; not used for scales of several columns, whose shape
            shows it.

    Raises:
        FormatError: the shapes do not match.
    """
    fault = FormatError(
        f"weight {weight} and weight_scale {scale} do not fit each other{' (two codes per byte)' if packed else ''}: "
        "the checkpoint is incomplete, or its description is wrong; save the model again"
    )
    if len(weight) != 2 or len(scale) not in (1, 2) or 0 in (*weight, *scale):
        raise fault
    (rows, columns), scales = weight, scale[0]
    per_row = scale[1] if len(scale) == 2 else 1
    if per_row > 1:
        if scales not in (rows, 2 * rows) or columns % per_row:
            raise fault
        return Geometry(scales, columns, columns // per_row, scales == 2 * rows)
    if scales == rows:
        return Geometry(rows, columns * (2 if packed else 1), -1, packed)
    out_features = 2 * rows if packed else rows
    groups, rest = divmod(scales, out_features)
    if rest or not groups or columns % groups or (len(scale) == 1 and groups != 1):
        raise fault
    return Geometry(out_features, columns, columns // groups, packed)


def read(tensors: Tensors, *, bits: int, group_size: int, packed: bool = False) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged.

    Args:
        tensors: arrays by suffix.
        bits: 4 or 8, from the description of the checkpoint.
        group_size: columns per group, -1 per output channel (`geometry` gives it).
        packed: two codes per byte.

    Raises:
        FormatError: tensors are missing or unknown, shapes disagree, codes are out of range, scales are not finite, or
            offsets are not valid codes (with their number).
    """
    parts = _parts(tensors, bits, group_size, packed)
    bad = _outliers(parts, bits)
    if bad.any():
        raise FormatError(_describe(parts, bits, bad))
    return _linear(parts, bits, group_size)


def read_with_outliers(
    tensors: Tensors, *, bits: int, group_size: int, packed: bool = False
) -> tuple[AffineLinear, OutlierReport]:
    """Read one layer and requantize groups whose offset is not a valid code; all other groups stay exact.

    Groups of zeros (scale 0, offset NaN) become codes at the zero point, which is exact. The others are rounded to
    nearest over a range that includes 0, with a scale that float16 can represent.

    Returns:
        the layer, and a report of the changed groups (empty if there are none).

    Raises:
        FormatError: as `read`, except for offsets; also for scale 0 with an infinite offset, whose weights are lost.
    """
    parts = _parts(tensors, bits, group_size, packed)
    bad = _outliers(parts, bits)
    lost = int((~np.isfinite(parts.offsets) & ~_zeros(parts)).sum())
    if lost:
        raise FormatError(
            f"{lost} groups have an infinite or NaN offset and are not groups of zeros (scale 0, offset NaN, equal "
            "codes): their weights are lost; quantize the layer again, or leave it in float"
        )
    codes, scales, offsets, report = requantize(parts.codes, parts.scales, parts.offsets, bits, bad)
    return _linear(_Parts(codes, scales, offsets, parts.bias), bits, group_size), report


def write(
    linear: AffineLinear, *, packed: bool = False, scale_shape: Literal["matrix", "column", "vector"] = "matrix"
) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix; offsets in the dtype of the scales.

    Args:
        linear: 4 or 8 bits, consecutive groups.
        packed: two codes per byte (4 bits only).
        scale_shape: "matrix" (out, in/g); "column" (out*in/g, 1); "vector" (out,), per channel only.

    Raises:
        FormatError: the layout cannot store the layer.
    """
    if linear.bits not in BITS or (packed and linear.bits != 4):
        raise FormatError(f"bits={linear.bits}: this layout stores 4 and 8 bits, packed only 4; use another layout")
    if not linear.sequential:
        raise FormatError("groups are reordered by activation, which this layout cannot store: use gptq")
    middle = 2 ** (linear.bits - 1)
    rows = linear.codes.T if linear.codes.flags.f_contiguous else transposed(linear.codes)
    weight = rows - np.uint8(middle)  # (out, in); wraps to two's complement
    if packed:
        axis = 1 if linear.group_size == -1 else 0
        if weight.shape[axis] % 2:
            raise FormatError(
                f"width {weight.shape[axis]} is odd: codes cannot be packed in pairs; write them unpacked"
            )
        low, high = (weight[:, 0::2], weight[:, 1::2]) if axis else (weight[0::2], weight[1::2])
        weight = (low & np.uint8(15)) | (high << np.uint8(4))
    scales = np.ascontiguousarray(linear.scales.T)  # (out, groups)
    offsets = (linear.zeros.T - np.int16(middle)).astype(scales.dtype)
    shapes = {"matrix": scales.shape, "column": (scales.size, 1), "vector": (linear.out_features,)}
    if scale_shape == "vector" and linear.groups != 1:
        raise FormatError("scale_shape=vector allows one scale per output channel: use matrix or column")
    tensors: dict[str, NDArray[Any]] = {
        "weight": np.ascontiguousarray(weight).view(np.int8),
        "weight_scale": scales.reshape(shapes[scale_shape]),
        "weight_offset": np.ascontiguousarray(offsets).reshape(shapes[scale_shape]),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.copy()
    return tensors


def check_range(low: int, high: int) -> None:
    """Raise FormatError unless bytes from low to high are codes of 4 bits."""
    if low < -8 or high > 7:
        raise FormatError(
            f"codes are in [{low}, {high}], but 4 bits allow [-8, 7]: the layer has 8 bits, or two codes per byte; correct "
            "the description, or save the model again"
        )


@dataclass(frozen=True, eq=False)
class _Parts:
    codes: NDArray[np.uint8]  # (out, in), u
    scales: NDArray[Any]  # (out, groups), finite
    offsets: NDArray[np.float32]  # (out, groups), as stored
    bias: NDArray[Any] | None


def _parts(tensors: Tensors, bits: int, group_size: int, packed: bool) -> _Parts:
    check_suffixes(tensors, TENSORS)
    weight, scales = tensors["weight"], as_float("weight_scale", tensors["weight_scale"])
    offsets = as_float("weight_offset", tensors["weight_offset"])
    if bits not in BITS or (packed and bits != 4):
        raise FormatError(f"bits={bits}: this layout stores 4 and 8 bits, packed only 4; check the description")
    if weight.dtype != np.int8 or weight.ndim != 2 or not weight.size:
        raise FormatError(f"weight is {weight.dtype} {weight.shape}: it must be an int8 matrix; is it a float layer?")
    rows, columns = weight.shape
    out_features, in_features = rows, columns
    if packed:
        out_features, in_features = (rows, 2 * columns) if group_size == -1 else (2 * rows, columns)
    groups = group_count(in_features, group_size)
    if scales.shape not in ((out_features, groups), (out_features * groups, 1)) and (
        groups != 1 or scales.shape != (out_features,)
    ):
        raise FormatError(
            f"weight_scale has shape {scales.shape}, but weight and group_size imply {(out_features, groups)}: "
            "check group_size and the save mode"
        )
    check_shape("weight_offset", offsets, scales.shape)
    if not np.isfinite(scales).all():
        count = int((~np.isfinite(scales)).sum())
        raise FormatError(f"{count} scales are infinite or NaN: quantize the layer again, or leave it in float")
    codes = _unpacked(weight, group_size == -1) if packed else weight.view(np.uint8) + np.uint8(2 ** (bits - 1))
    if bits == 4 and not packed and int(codes.max()) > 15:
        check_range(int(weight.min()), int(weight.max()))
    shape = (out_features, groups)
    return _Parts(codes, scales.reshape(shape), offsets.astype(np.float32, copy=False).reshape(shape), bias_of(tensors))


def _unpacked(weight: NDArray[np.int8], along_in: bool) -> NDArray[np.uint8]:
    """Two nibbles per byte -> u = q + 8, (out, in)."""
    stored = weight.view(np.uint8) ^ np.uint8(0x88)  # two's complement nibble + 8
    rows, columns = stored.shape
    codes = np.empty((rows, 2 * columns) if along_in else (2 * rows, columns), dtype=np.uint8)
    low, high = (codes[:, 0::2], codes[:, 1::2]) if along_in else (codes[0::2], codes[1::2])
    np.bitwise_and(stored, np.uint8(15), out=low)
    np.right_shift(stored, np.uint8(4), out=high)
    return codes


def _outliers(parts: _Parts, bits: int) -> NDArray[np.bool_]:
    """bool (out, groups): the offset is not a valid code."""
    middle = 2 ** (bits - 1)
    offsets = parts.offsets
    # NaN compares false
    fits: NDArray[np.bool_] = (offsets >= -middle) & (offsets <= middle - 1) & (np.rint(offsets) == offsets)
    return np.logical_not(fits)


def _zeros(parts: _Parts) -> NDArray[np.bool_]:
    """bool (out, groups): a group of zeros as the quantizer stores it (0/0)."""
    found: NDArray[np.bool_] = (parts.scales == 0) & np.isnan(parts.offsets)
    channels, groups = np.nonzero(found)
    codes = parts.codes.reshape(*found.shape, -1)[channels, groups]  # (n, g)
    found[channels, groups] = (codes == codes[:, :1]).all(axis=1)
    return found


def _describe(parts: _Parts, bits: int, bad: NDArray[np.bool_]) -> str:
    offsets, middle = parts.offsets[bad], 2 ** (bits - 1)
    finite = offsets[np.isfinite(offsets)]
    outside = finite[(finite < -middle) | (finite > middle - 1)]
    facts = []
    if outside.size:
        facts.append(
            f"{outside.size} offsets outside [{-middle}, {middle - 1}] (from {outside.min():g} to {outside.max():g})"
        )
    if finite.size > outside.size:
        facts.append(f"{finite.size - outside.size} offsets that are not integral")
    if offsets.size > finite.size:
        facts.append(f"{offsets.size - finite.size} offsets that are infinite or NaN")
    return (
        f"{int(bad.sum())} of {bad.size} groups have no exact zero point: {', '.join(facts)}; "
        "allow requantizing these groups (requantize_outliers), or quantize the model again"
    )


def _linear(parts: _Parts, bits: int, group_size: int) -> AffineLinear:
    zeros = parts.offsets.astype(np.int16) + np.int16(2 ** (bits - 1))
    return AffineLinear(
        codes=parts.codes.T,  # column-major, not copied
        scales=turned(parts.scales),
        zeros=turned(zeros),
        group_index=sequential_groups(parts.codes.shape[1], group_size),
        bits=bits,
        group_size=group_size,
        bias=parts.bias,
    )
