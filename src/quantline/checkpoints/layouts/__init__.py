"""Weight layouts: each answers for itself (`layout.Layout`), and `registry.LAYOUTS` holds all of them.

Layouts whose weights are ``(u - z) * s`` are read into one middle form, `AffineLinear`, and written from it. Pure NumPy: the
same code runs in the core environment and inside workers.
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
