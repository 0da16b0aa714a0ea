"""Weight layouts: a `layout.Layout` describes each, and `registry.LAYOUTS` lists them.

Layouts whose weights are ``(u - z) * s`` are read into a common form, `AffineLinear`, and written from it. Pure NumPy: the
same code runs in the core environment and in workers.
"""

from __future__ import annotations

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.affine import AffineLinear, dequantize, quantize_rtn, round_scales
from quantline.checkpoints.layouts.checks import Tensors
from quantline.checkpoints.layouts.layout import Layout, Storage
from quantline.checkpoints.layouts.registry import LAYOUTS, TARGETS

__all__ = [
    "LAYOUTS",
    "TARGETS",
    "AffineLinear",
    "FormatError",
    "Layout",
    "Storage",
    "Tensors",
    "dequantize",
    "quantize_rtn",
    "round_scales",
]
