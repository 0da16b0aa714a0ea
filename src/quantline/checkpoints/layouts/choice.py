"""The layout that round to nearest is written in."""

from __future__ import annotations

from quantline.checkpoints.layouts.linear_spec import LinearSpec


def layout_of(widths: set[LinearSpec], symmetric: bool) -> str:
    """The layout that a result is written in; AWQ knows one width of 4 bits."""
    if symmetric:
        return "gptq"
    return "awq_gemm" if len(widths) == 1 and next(iter(widths)).bits == 4 else "gptq_v2"
