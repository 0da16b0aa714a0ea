"""Round to nearest in torch: what any method has to beat in its own grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.checkpoints.layouts.linear_spec import LayerSettings

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 2.0**-24  # the smallest float16


def rounded(weight: Tensor, grid: LayerSettings) -> Tensor:
    """The weight rounded to nearest and dequantized, as `checkpoints.layouts.quantize_rtn` does it.

    Args:
        weight: float32 (out, in).
        grid: bits, group size (-1 is one group per row), and whether every zero point is the middle one.

    Returns:
        float32 (out, in).
    """
    import torch

    groups = weight.reshape(-1, grid.group_size if grid.group_size > 0 else weight.shape[1])
    top, middle = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    high, low = groups.amax(dim=1, keepdim=True), groups.amin(dim=1, keepdim=True)
    span = torch.maximum(high.abs(), low.abs()) if grid.symmetric else high.clamp(min=0) - low.clamp(max=0)
    scales = (span / (middle - 1 if grid.symmetric else top)).half().float().clamp(min=_TINY)
    scales = torch.where(span == 0, torch.ones_like(scales), scales)
    zeros = torch.full_like(scales, middle)
    if not grid.symmetric:
        zeros = torch.where(span == 0, zeros, (-low.clamp(max=0) / scales).round().clamp(0, top))
    codes = ((groups / scales).round() + zeros).clamp(0, top)
    return ((codes - zeros) * scales).reshape(weight.shape)
