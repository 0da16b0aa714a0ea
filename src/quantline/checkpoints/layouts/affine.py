"""The common form that affine weight layouts are read into and written from.

One quantized linear layer stands for ``w[o, i] = (u[i, o] - z[group[i], o]) * s[group[i], o]``.

Codes are kept (in, out), the transpose of the float weight: the GPTQ and AWQ GEMM layouts store them that way,
so reading and writing them needs no transpose, and scales and zero points (groups, out) line up with the columns.
Layouts that store them (out, in) use a transposed view (``.T``): only the shape is fixed, not the memory order.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.half import all_finite, narrowed
from quantline.checkpoints.layouts.packing import BITS

Gridded = TypeVar("Gridded", "Grid", "AffineLinear")

# Rows of the float weight dequantized at a time; limits the float32 temporaries.
_BLOCK = 256

# Factors of a group's range that `grid="mse"` tries: steps of 2 %.
_FACTORS = 26

# The smallest positive float16; a smaller scale would round to zero and lose the group.
_TINY = np.float16(2.0**-24)


@dataclass(frozen=True, eq=False)
class Grid:
    """`AffineLinear` without its codes and bias; not checked."""

    scales: NDArray[Any]
    zeros: NDArray[np.int16]
    group_index: NDArray[np.int32]
    bits: int
    group_size: int

    @property
    def in_features(self) -> int:
        """Input width of the layer."""
        return int(self.group_index.shape[0])

    @property
    def out_features(self) -> int:
        """Output width of the layer."""
        return int(self.scales.shape[1])

    @property
    def groups(self) -> int:
        """Number of groups along the input."""
        return int(self.scales.shape[0])

    @property
    def symmetric(self) -> bool:
        """Every zero point is the middle, ``2**(bits-1)``; a config may say so only then, since kernels then ignore them."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    @property
    def sequential(self) -> bool:
        """Groups are runs of consecutive input columns (no reordering by activation)."""
        return bool(np.array_equal(self.group_index, sequential_groups(self.in_features, self.group_size)))


@dataclass(frozen=True, eq=False)
class AffineLinear:
    """Codes, scales and zero points of one linear layer, checked on creation.

    Attributes:
        codes: uint8 (in, out), unsigned codes in [0, 2**bits - 1]; row-major or column-major.
        scales: float16 or float32 (groups, out), finite, as stored.
        zeros: int16 (groups, out), unsigned zero points in [0, 2**bits - 1].
        group_index: int32 (in,), the group of every input column; ``i // group_size`` unless columns were reordered
            by activation (GPTQ's desc_act).
        bits: 2, 3, 4 or 8.
        group_size: input columns per group; -1 for a single group (per output channel).
        bias: float16 or float32 (out,), or None.

    Raises:
        FormatError: shapes, dtypes or ranges disagree.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.int16]
    group_index: NDArray[np.int32]
    bits: int
    group_size: int
    bias: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        """Check everything once, so that writers need not."""
        if self.bits not in BITS:
            raise FormatError(f"bits={self.bits}: use 2, 3, 4 or 8")
        if self.codes.dtype != np.uint8 or self.codes.ndim != 2 or not self.codes.size:
            raise FormatError(f"codes are {self.codes.dtype} {self.codes.shape}: give a non-empty uint8 (in, out)")
        groups = group_count(self.in_features, self.group_size)
        top = 2**self.bits - 1
        _expect("scales", self.scales, (groups, self.out_features), (np.float16, np.float32))
        _expect("zeros", self.zeros, (groups, self.out_features), (np.int16,))
        _expect("group_index", self.group_index, (self.in_features,), (np.int32,))
        if self.bias is not None:
            _expect("bias", self.bias, (self.out_features,), (np.float16, np.float32))
        if not all_finite(self.scales):
            raise FormatError("scales are infinite or NaN: quantize this layer again")
        for name, array, limit in (
            ("codes", self.codes, top),
            ("zeros", self.zeros, top),
            ("group_index", self.group_index, groups - 1),
        ):
            if int(array.max()) > limit or (array.dtype.kind == "i" and int(array.min()) < 0):
                low, high = int(array.min()), int(array.max())
                raise FormatError(
                    f"{name} has values in [{low}, {high}]: this {self.bits}-bit layer allows [0, {limit}]"
                )

    @property
    def in_features(self) -> int:
        """Input width of the layer."""
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        """Output width of the layer."""
        return int(self.codes.shape[1])

    @property
    def groups(self) -> int:
        """Number of groups along the input."""
        return self.grid.groups

    @property
    def symmetric(self) -> bool:
        """See `Grid`."""
        return self.grid.symmetric

    @property
    def sequential(self) -> bool:
        """See `Grid`."""
        return self.grid.sequential

    @property
    def grid(self) -> Grid:
        """The layer without codes and bias; shares the arrays."""
        return Grid(self.scales, self.zeros, self.group_index, self.bits, self.group_size)


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups along the input.

    Raises:
        FormatError: the size is neither -1 nor a positive divisor of ``in_features``.
    """
    if group_size == -1:
        return 1
    if group_size < 1 or in_features % group_size:
        raise FormatError(
            f"group_size={group_size} does not divide the input width {in_features}: use a divisor, or -1 for one group"
        )
    return in_features // group_size


def sequential_groups(in_features: int, group_size: int) -> NDArray[np.int32]:
    """int32 (in,): ``i // group_size``, or all zero for -1."""
    group_count(in_features, group_size)
    width = in_features if group_size == -1 else group_size
    return np.arange(in_features, dtype=np.int32) // np.int32(width)


def transposed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A contiguous transpose, tile by tile: several times faster than one strided copy of a large byte matrix.

    For column-major codes it is a view and costs nothing.
    """
    if codes.flags.f_contiguous:
        return codes.T
    rows, columns = codes.shape
    result = np.empty((columns, rows), dtype=codes.dtype)
    for row in range(0, rows, 64):
        for column in range(0, columns, 256):
            tile = codes[row : row + 64, column : column + 256]
            result[column : column + 256, row : row + 64] = tile.T
    return result


def dequantize(linear: AffineLinear, dtype: Any = np.float32) -> NDArray[Any]:
    """The weight (out, in), contiguous, that the codes stand for.

    ``(u - z) * s`` is evaluated in float32: exact for float16 scales (8 + 11 significant bits fit into 24), correctly
    rounded for float32 ones. Any other ``dtype`` is rounded once from that.
    """
    weight = np.empty((linear.out_features, linear.in_features), dtype=dtype)
    zeros, scales = linear.zeros.T.astype(np.float32), linear.scales.T.astype(np.float32)  # (out, groups)
    codes = transposed(linear.codes)  # (out, in)
    for start in range(0, linear.out_features, _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = codes[rows].astype(np.float32)  # (block, in)
        block -= zeros[rows].take(linear.group_index, axis=1)
        block *= scales[rows].take(linear.group_index, axis=1)
        weight[rows] = block
    return weight


def round_scales(linear: Gridded) -> Gridded:
    """The same layer with float16 scales, for layouts that store nothing wider.

    This changes the weights (relative error up to 2**-11), so no writer does it by itself.

    Raises:
        FormatError: a scale leaves the range of float16.
    """
    scales = linear.scales.copy() if linear.scales.dtype == np.float16 else narrowed(linear.scales)
    # Bits of the magnitude, as integers: zero is 0, infinity 0x7C00.
    bits = np.bitwise_and(scales.view(np.uint16), np.uint16(0x7FFF))
    if int(bits.max()) >= 0x7C00 or int(bits.min()) == 0:
        lost = (bits >= 0x7C00) | ((bits == 0) & (linear.scales != 0))
        if lost.any():
            raise FormatError(f"{int(lost.sum())} scales leave the range of float16: use a layout with float32 scales")
    rounded = copy(linear)  # not `replace`, which would check all codes again
    object.__setattr__(rounded, "scales", scales)
    return rounded


def quantize_rtn(
    weight: NDArray[Any], bits: int, group_size: int, symmetric: bool, *, grid: str = "absmax"
) -> AffineLinear:
    """Round to nearest, the baseline that every method must beat.

    Per group of ``group_size`` consecutive input columns of a row (the whole row for -1):
    symmetric ``s = max|w| / (2**(b-1) - 1)``, ``z = 2**(b-1)``; asymmetric, over a range that includes zero,
    ``s = (max - min) / (2**b - 1)``, ``z = round(-min / s)``. The scale is rounded to float16 first, and the codes
    ``round(w / s) + z`` are computed with the rounded scale, which is the stored one. All-zero
    groups get s = 1 and u = z = 2**(b-1).

    Args:
        weight: floating point (out, in). Not modified.
        grid: `absmax`, as above, or `mse`: the range of each group is shrunk by the factor that gives the least squared
            error, of 26 from 1 to 1/2; the largest weights are then clipped.

    Raises:
        FormatError: non-finite weights, a group too large for a float16 scale, or a group size that does not divide in.
    """
    if weight.ndim != 2 or not weight.size:
        raise FormatError(f"weight has shape {weight.shape}: give a non-empty (out, in) matrix")
    if bits not in BITS:
        raise FormatError(f"bits={bits}: use 2, 3, 4 or 8")
    out_features, in_features = weight.shape
    groups = group_count(in_features, group_size)
    top = 2**bits - 1
    grouped = weight.astype(np.float32).reshape(out_features, groups, -1)
    high, low = grouped.max(axis=2), grouped.min(axis=2)  # (out, groups)
    if not (np.isfinite(high).all() and np.isfinite(low).all()):
        raise FormatError("the weight has infinities or NaN: check the float checkpoint")
    if grid == "mse":
        factors = _least_error(grouped, low, high, bits, symmetric)
        low, high = low * factors, high * factors
    scales, zeros = _scales_of(low, high, bits, symmetric)
    steps = scales.astype(np.float32)
    grouped /= steps[:, :, None]
    np.rint(grouped, out=grouped)
    grouped += zeros[:, :, None]
    np.clip(grouped, 0, top, out=grouped)
    return AffineLinear(
        codes=grouped.reshape(out_features, in_features).astype(np.uint8).T,
        scales=np.ascontiguousarray(scales.T),
        zeros=np.ascontiguousarray(zeros.T.astype(np.int16)),
        group_index=sequential_groups(in_features, group_size),
        bits=bits,
        group_size=group_size,
    )


def _scales_of(
    low: NDArray[np.float32], high: NDArray[np.float32], bits: int, symmetric: bool
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Scales and zero points (out, groups) of groups from `low` to `high`."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    span = np.maximum(np.abs(high), np.abs(low)) if symmetric else np.maximum(high, 0) - np.minimum(low, 0)
    with np.errstate(over="ignore", under="ignore"):
        scales = (span / np.float32(middle - 1 if symmetric else top)).astype(np.float16)
    if not np.isfinite(scales).all():
        raise FormatError(
            f"a weight group spans {float(span.max()):.3g}, too much for a float16 scale: rescale the layer"
        )
    empty = span == 0
    scales = np.where(empty, np.float16(1), np.maximum(scales, _TINY))
    if symmetric:
        return scales, np.full(scales.shape, middle, dtype=np.float32)
    # An empty group may have any zero point; the middle one avoids the problem of 0 in the GPTQ v1 layout.
    steps = scales.astype(np.float32)
    return scales, np.where(empty, np.float32(middle), np.clip(np.rint(-np.minimum(low, 0) / steps), 0, top))


def _least_error(
    grouped: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32], bits: int, symmetric: bool
) -> NDArray[np.float32]:
    """For each group the factor of its range with the least squared error, float32 (out, groups)."""
    best, factors = np.full(low.shape, np.inf, np.float32), np.ones(low.shape, np.float32)
    for factor in np.linspace(1.0, 0.5, _FACTORS, dtype=np.float32):
        scales, zeros = _scales_of(low * factor, high * factor, bits, symmetric)
        steps, offsets = scales.astype(np.float32)[:, :, None], zeros[:, :, None]
        rounded = np.clip(np.rint(grouped / steps) + offsets, 0, 2**bits - 1)
        rounded -= offsets
        rounded *= steps
        rounded -= grouped
        error = np.einsum("ogi,ogi->og", rounded, rounded)
        better = error < best
        best, factors = np.where(better, error, best), np.where(better, factor, factors)
    return factors


def _expect(name: str, array: NDArray[Any], shape: tuple[int, ...], dtypes: tuple[type, ...]) -> None:
    if array.shape != shape or array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise FormatError(f"{name} is {array.dtype} {array.shape}: it must be {wanted} {shape}")
