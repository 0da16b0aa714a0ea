"""Facts about a linear's scales and zero points, known before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantline.checkpoints.layouts.affine import Gridded
from quantline.checkpoints.layouts.half import widened


@dataclass(frozen=True)
class LayerFacts:
    """Facts about a linear's scales and zero points.

    symmetric: every zero point is the middle one. sequential: groups are consecutive columns. least_zero: the smallest
    zero point. scale_loss: the largest relative change of a scale by the cast to float16. outliers: number of groups that
    must be quantized again.
    """

    symmetric: bool
    sequential: bool
    least_zero: int
    scale_loss: float
    scale_dtype: str
    outliers: int = 0


def scale_loss(before: Gridded, after: Gridded) -> float:
    """The largest relative change of a scale, and so of any weight, since ``w = (u - z) * s``."""
    old, new = widened(before.scales), widened(after.scales)
    # A float16 neighbour is within a factor of two, so the difference is exact in float32. Only quotients that may be the
    # largest are computed in float64.
    change, size = np.abs(new - old), np.abs(old)
    rough = np.divide(change, size, out=np.zeros_like(size), where=size != 0)
    if not rough.any():
        return 0.0
    near = rough >= rough.max() * np.float32(1 - 2.0**-20)
    exact, whole = change[near].astype(np.float64), size[near].astype(np.float64)
    return float((exact / whole).max())
