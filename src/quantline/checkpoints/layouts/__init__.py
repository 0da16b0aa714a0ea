"""Weight layouts around one middle form: read -> `AffineLinear` -> write.

Pure NumPy; the same code runs in the core environment and inside workers. A layout is a module with the members
of `Layout`; adding one means adding a module and a line to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts import awq_gemm, awq_gemv, gptq, gptq_v2
from quantline.checkpoints.layouts.affine import AffineLinear, dequantize, quantize_rtn, round_scales
from quantline.checkpoints.layouts.checks import Tensors
from quantline.checkpoints.layouts.compressed_tensors import int_quantized, pack_quantized

__all__ = [
    "LAYOUTS",
    "AffineLinear",
    "FormatError",
    "Layout",
    "Tensors",
    "dequantize",
    "quantize_rtn",
    "round_scales",
]


class Layout(Protocol):
    """What a layout module offers. All of it is pure; inputs stay unchanged."""

    NAME: str  # its key in `LAYOUTS`
    TENSORS: Mapping[str, bool]  # tensor suffix -> whether a layer must have it

    def read(self, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
        """One layer's tensors, keyed by suffix, as the middle form."""

    def write(self, linear: AffineLinear) -> dict[str, NDArray[Any]]:
        """The middle form as one layer's tensors, keyed by suffix."""


LAYOUTS: dict[str, Layout] = {
    "awq_gemm": awq_gemm,
    "awq_gemv": awq_gemv,
    "compressed_tensors": pack_quantized,
    "compressed_tensors_int": int_quantized,
    "gptq": gptq,
    "gptq_v2": gptq_v2,
}
