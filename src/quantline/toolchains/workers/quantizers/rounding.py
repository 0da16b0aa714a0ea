"""Rounding in torch for all backends: scales are rounded as stored, and every group's range includes zero.

Their modules describe what AutoAWQ, AutoGPTQ and GPTQModel do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Fewest tokens for the search of AWQ's clipping range, as in the libraries.
_CLIP_TOKENS = 512


def awq_codes(weight: Any, group_size: int, symmetric: bool) -> tuple[Any, Any, Any]:
    """Round to 4 bits, for AWQ's layouts.

    A group's range includes zero, because its zero point must be in [0, 15]. Scales are rounded to float16 first.

    Args:
        weight: (..., in), floating. group_size: -1 means one group per row. symmetric: every zero point is 8.

    Returns:
        float32 codes (rows*groups, g), scales (rows*groups, 1) of float16 values, zero points (rows*groups, 1).
    """
    import torch

    groups = weight.reshape(-1, group_size if group_size > 0 else weight.shape[-1]).float()
    if symmetric:
        scales = (groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / 7).half().float()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(dim=1, keepdim=True).clamp(max=0), groups.amax(dim=1, keepdim=True).clamp(min=0)
        scales = ((high - low).clamp(min=1e-5) / 15).half().float()
        zeros = (-torch.round(low / scales)).clamp(0, 15)
    return torch.clamp(torch.round(groups / scales) + zeros, 0, 15), scales, zeros


def awq_rounded(weight: Any, group_size: int, symmetric: bool) -> tuple[Any, Any, Any]:
    """The dequantized rounded weight, (out, in) in the weight's dtype; scales and zero points (out, groups)."""
    codes, scales, zeros = awq_codes(weight, group_size, symmetric)
    rounded = ((codes - zeros) * scales).reshape(weight.shape).to(weight.dtype)
    return rounded, scales.view(weight.shape[0], -1), zeros.view(weight.shape[0], -1)


def awq_clip(weight: Any, inputs: Any, group_size: int, symmetric: bool) -> Any:
    """The best clipping limit of each group: one of ten, from its largest absolute value down to 11/20 of it.

    The candidates and tokens are the same as in the libraries. The error |X(W'-W)|^2 is computed from one Gram matrix per
    group, in float32, instead of temporaries of (out, tokens, in).

    Args:
        weight: (out, in). inputs: (..., in), the linear's inputs. group_size: -1 means one group per row.

    Returns:
        (out, groups, 1) in the weight's dtype.
    """
    import torch

    size = group_size if group_size > 0 else weight.shape[1]
    tokens = inputs.reshape(-1, inputs.shape[-1])
    tokens = tokens[:: max(1, tokens.shape[0] // _CLIP_TOKENS)].to(weight.device).float()
    by_group = tokens.reshape(tokens.shape[0], -1, size).transpose(0, 1)  # (groups, tokens, g)
    gram = by_group.transpose(1, 2) @ by_group  # (groups, g, g)
    whole = weight.float().reshape(weight.shape[0], -1, size).transpose(0, 1)  # (groups, out, g)
    limit = whole.abs().amax(dim=2, keepdim=True)
    best, least = limit.clone(), torch.full_like(limit, float("inf"))
    for step in range(10):
        candidate = limit * (1 - step / 20)
        clipped = torch.clamp(whole, -candidate, candidate).contiguous()
        codes, scales, zeros = awq_codes(clipped, size, symmetric)
        change = ((codes - zeros) * scales).view_as(whole) - whole
        error = ((change @ gram) * change).sum(dim=2, keepdim=True)  # |X change|^2 of every row and group
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, candidate, best)
    return best.transpose(0, 1).to(weight.dtype)


def gptq_quantizer(base: Any, symmetric: Callable[[Any], bool]) -> Any:
    """A library's GPTQ `Quantizer` whose scales are rounded as stored.

    They are rounded to float16 before weights are rounded with them. The libraries clip a symmetric group without negative
    weights at 7/15 of its largest weight; here its scale is doubled.

    Args:
        base: the library's class.
        symmetric: whether a given instance makes symmetric groups.
    """
    import torch

    class Quantizer(base):  # type: ignore[misc]
        scale: Any

        def find_params(self, x: Any, weight: bool = False) -> None:
            super().find_params(x, weight=weight)
            scale: Any = self.scale
            if symmetric(self):
                flat = x.flatten(1)
                one_sided = (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) > 0)
                scale = torch.where(one_sided.view_as(scale), scale * 2, scale)
            # 2**-24 is the smallest float16; it avoids division by a zero scale.
            self.scale = torch.clamp(scale.half().to(scale.dtype), min=2.0**-24)

    return Quantizer
