"""Requantizes groups whose zero point is not a valid code, only on request, and reports each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError

# Weights rounded at a time; limits the float64 temporaries if a whole layer is out of range.
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class OutlierReport:
    """The requantized groups of one layer, in order of channel and group; all arrays are (n,).

    Attributes:
        channels: int64, output channel.
        groups: int64, group along the input.
        old_scales, old_offsets: float64, as stored (the offset in signed codes; it may be NaN).
        new_scales, new_zeros: float64 and int16, their replacements (the zero point is unsigned).
        errors: float64, largest ``|new - old|`` over the weights of the group, where old is ``(q - offset) * s``;
            0 for a group of zeros, which is restored exactly.
        peaks: float64, largest ``|old|`` of the group, for relative errors.
    """

    channels: NDArray[np.int64]
    groups: NDArray[np.int64]
    old_scales: NDArray[np.float64]
    old_offsets: NDArray[np.float64]
    new_scales: NDArray[np.float64]
    new_zeros: NDArray[np.int16]
    errors: NDArray[np.float64]
    peaks: NDArray[np.float64]

    def __len__(self) -> int:
        return int(self.channels.size)

    @property
    def exact(self) -> int:
        """Number of groups whose weights have not changed."""
        return int((self.errors == 0).sum())

    @property
    def largest_relative_error(self) -> float:
        """The largest ratio of a group's error to its largest weight; 0 without groups."""
        relative = np.divide(self.errors, self.peaks, out=np.zeros_like(self.errors), where=self.peaks > 0)
        return float(relative.max(initial=0.0))

    def records(self) -> list[dict[str, Any]]:
        """One JSON-able mapping per group; an offset that is not finite is given as text."""
        return [
            {
                "channel": int(self.channels[i]),
                "group": int(self.groups[i]),
                "old_scale": float(self.old_scales[i]),
                "old_offset": _number(float(self.old_offsets[i])),
                "new_scale": float(self.new_scales[i]),
                "new_zero": int(self.new_zeros[i]),
                "max_abs_error": float(self.errors[i]),
                "max_abs_weight": float(self.peaks[i]),
            }
            for i in range(len(self))
        ]


def requantize(
    codes: NDArray[np.uint8], scales: NDArray[Any], offsets: NDArray[np.float32], bits: int, bad: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.float32], OutlierReport]:
    """Requantize the marked groups, so that every offset is a valid code.

    Over the group's weights and 0: ``s = (max - min) / (2**b - 1)``, rounded to float16 if in its range (so that
    layouts with float16 scales can store it), ``z = round(-min / s)``, ``u = round(w / s) + z``. A group of zeros gets s = 1
    and u = z = 2**(b-1).

    Args:
        codes: uint8 (out, in), u = q + 2**(b-1). Not modified.
        scales: float16 or float32 (out, groups), finite. Not modified.
        offsets: float32 (out, groups), in signed codes; NaN only where the scale is 0. Not modified.
        bits: of the codes.
        bad: bool (out, groups), the groups to change.

    Returns:
        codes, scales and offsets with the marked groups replaced, and the report.

    Raises:
        FormatError: a group's new scale is beyond the range of the scales' dtype.
    """
    channels, groups = np.nonzero(bad)
    out_features, count = scales.shape
    grouped = codes.reshape(out_features, count, -1)
    changed, changed_scales, changed_offsets = grouped, scales, offsets
    if channels.size:
        changed, changed_scales, changed_offsets = grouped.copy(), scales.copy(), offsets.copy()
    zeros, errors, peaks = np.empty(channels.size), np.empty(channels.size), np.empty(channels.size)
    step = max(1, _CHUNK // grouped.shape[2])
    for start in range(0, channels.size, step):
        part = slice(start, start + step)
        place = channels[part], groups[part]
        fresh, steps, zeros[part], errors[part], peaks[part] = _rounded(
            grouped[place], scales[place], offsets[place], bits
        )
        changed[place] = fresh
        changed_scales[place] = steps
        changed_offsets[place] = zeros[part] - 2 ** (bits - 1)
    report = OutlierReport(
        channels=channels,
        groups=groups,
        old_scales=scales[channels, groups].astype(np.float64),
        old_offsets=offsets[channels, groups].astype(np.float64),
        new_scales=changed_scales[channels, groups].astype(np.float64),
        new_zeros=zeros.astype(np.int16),
        errors=errors,
        peaks=peaks,
    )
    return changed.reshape(codes.shape), changed_scales, changed_offsets, report


def _rounded(
    codes: NDArray[np.uint8], scales: NDArray[Any], offsets: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Groups (n, g) -> new codes (n, g), scales, zero points, largest errors and largest weights (n,)."""
    middle, top = 2 ** (bits - 1), 2**bits - 1
    meant = codes.astype(np.float64) - middle
    meant -= np.where(np.isnan(offsets), 0, offsets).astype(np.float64)[:, None]
    meant *= scales.astype(np.float64)[:, None]
    high, low = np.maximum(meant.max(axis=1), 0), np.minimum(meant.min(axis=1), 0)
    empty = high == low
    steps = _storable(np.where(empty, 1.0, (high - low) / top), scales.dtype)
    zeros = np.where(empty, middle, np.clip(np.rint(-low / steps), 0, top))
    fresh = np.clip(np.rint(meant / steps[:, None]) + zeros[:, None], 0, top)
    errors = np.abs((fresh - zeros[:, None]) * steps[:, None] - meant).max(axis=1)
    return fresh.astype(np.uint8), steps, zeros, errors, np.maximum(high, -low)


def _storable(scales: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """Rounded to float16 if that gives a normal number, otherwise to ``dtype``."""
    with np.errstate(over="ignore", under="ignore"):
        half = scales.astype(np.float16).astype(np.float64)
        stored = scales.astype(dtype).astype(np.float64)
    normal = np.isfinite(half) & (half >= 2.0**-14)
    if not (normal | (np.isfinite(stored) & (stored != 0))).all():
        raise FormatError(f"a group needs a scale beyond the range of {dtype}: quantize the layer again")
    return np.where(normal, half, stored)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
