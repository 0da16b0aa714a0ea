"""Weights of 8 and 4 bits that are floating-point numbers themselves, and their scales, as float32 in NumPy.

    E4M3   8 bits: 1 sign, 4 exponent (bias 7), 3 mantissa; 0x7F and 0xFF are NaN, there is no infinity (OCP FP8)
    E2M1   4 bits: 1 sign and the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP MX); the first of two is in a byte's low half
    E8M0   8 bits, a scale: 2**(code - 127); 0xFF is NaN (OCP MX)

There is no even grid, so no `AffineLinear` holds them: layouts of these are read as weights. A weight is its code's value
times its scale, rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.checks import as_float, check_shape
from quantline.checkpoints.layouts.layout import Found

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
LARGEST_E2M1 = 6.0
LARGEST_E4M3 = 448.0


def _e4m3() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    values[(codes & 127) == 127] = np.nan
    return (np.where(codes & 128, -1.0, 1.0) * values).astype(np.float32)


def _e8m0() -> NDArray[np.float32]:
    values = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
    values[255] = np.nan
    return values


E4M3 = _e4m3()
with np.errstate(over="ignore"):
    E8M0 = _e8m0()


def raw(name: str, array: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """The bytes of a matrix of one-byte values, in its shape.

    dtype: what the file must call it, `F8_E4M3` or `U8`.

    Raises:
        FormatError: it has another dtype, or is no matrix.
    """
    names = {"F8_E4M3": ("float8_e4m3fn", "F8_E4M3"), "U8": ("uint8",)}[dtype]
    held = array.dtype.names[0] if array.dtype.names else array.dtype.name
    if held not in names:
        raise FormatError(f"{name} is {array.dtype}, and this layout stores {dtype}: read it in its own layout")
    if array.ndim != 2 or not array.size:
        raise FormatError(f"{name} has shape {array.shape}: it must be a matrix; fetch or write the layer again")
    return np.ascontiguousarray(array).view(np.uint8).reshape(array.shape)


def halves(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values (out, 2 * columns) of two E2M1 codes a byte."""
    pairs = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=1)  # (256, 2), by byte
    return pairs[packed].reshape(packed.shape[0], -1)


def grouped(values: NDArray[np.float32], scales: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Multiply `size` consecutive input columns with their scale, in place.

    Args:
        values: (out, in). scales: (out, in / size).

    Raises:
        FormatError: the scales have another shape.
    """
    rows, columns = values.shape
    check_shape("weight_scale", scales, (rows, -(-columns // size)))
    if columns % size:
        raise FormatError(f"groups of {size} do not fill the input width {columns}: check the checkpoint's config")
    parts = values.reshape(rows, -1, size)
    parts *= scales[:, :, None]
    return values


def blocked(values: NDArray[np.float32], scales: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Multiply squares of `size` rows and columns with their scale, in place; the last ones may be cut.

    Args:
        values: (out, in). scales: (ceil(out / size), ceil(in / size)).

    Raises:
        FormatError: the scales have another shape.
    """
    rows, columns = values.shape
    check_shape("weight_scale", scales, (-(-rows // size), -(-columns // size)))
    for number, row in enumerate(scales):
        values[number * size : (number + 1) * size] *= np.repeat(row, size)[:columns]
    return values


def whole(values: NDArray[np.float32], scales: NDArray[Any], name: str = "weight_scale") -> NDArray[np.float32]:
    """Multiply with one scale for all, or one a row, in place.

    Raises:
        FormatError: the scales are of another shape.
    """
    own = as_float(name, scales).astype(np.float32)
    if own.size == 1:
        values *= own.reshape(())
    else:
        check_shape(name, own[:, None] if own.ndim == 1 else own, (values.shape[0], 1))
        values *= own.reshape(-1, 1)
    return values


def single(name: str, array: NDArray[Any]) -> np.float32:
    """The value of a tensor of one positive number.

    Raises:
        FormatError: it has more than one, or the number is not positive and finite.
    """
    value = as_float(name, array).astype(np.float32).reshape(-1)
    if value.size != 1 or not np.isfinite(value[0]) or value[0] <= 0:
        raise FormatError(
            f"{name} is {value[:2].tolist()}: it must be one positive number; fetch or write the layer again"
        )
    return np.float32(value[0])


def scaled_linears(dtypes: Mapping[str, str], *, known: Mapping[str, bool]) -> dict[str, Found]:
    """The linears among tensor names -> dtypes: those with a `weight_scale`. known: suffix -> whether it must be there."""
    layers = sorted(name.removesuffix(".weight_scale") for name in dtypes if name.endswith(".weight_scale"))
    return {
        layer: Found(
            {suffix: f"{layer}.{suffix}" for suffix in known if f"{layer}.{suffix}" in dtypes},
            tuple(suffix for suffix, needed in known.items() if needed and f"{layer}.{suffix}" not in dtypes),
            "weight" not in known and f"{layer}.weight" in dtypes,
        )
        for layer in layers
    }
