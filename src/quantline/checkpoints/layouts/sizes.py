"""Bytes of one linear in each layout."""

from __future__ import annotations

from dataclasses import dataclass

from quantline.checkpoints.layouts.awq_gemv import zeros_width
from quantline.checkpoints.layouts.linear_spec import LinearSpec


@dataclass(frozen=True)
class LinearBytes:
    """One packed linear without its bias: codes, scales, zero points, and the rest (group index, shape)."""

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    other: int = 0

    def __add__(self, more: LinearBytes) -> LinearBytes:
        return LinearBytes(
            self.codes + more.codes, self.scales + more.scales, self.zeros + more.zeros, self.other + more.other
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.scales + self.zeros + self.other


def linear_bytes(
    layout: str, in_features: int, out_features: int, width: LinearSpec, *, symmetric: bool, double_quant: bool = True
) -> LinearBytes:
    """What a layout's tensors take for one linear (see `quantline.checkpoints.layouts` for their shapes); float16 scales.

    layout: a key of `formats.LAYOUTS`, msmodelslim or bitsandbytes (whose JSON of some hundred bytes a linear is not
    counted). symmetric: for compressed-tensors, which then leaves zero points out; double_quant: for bitsandbytes.
    """
    bits, values = width.bits, in_features * out_features
    groups = 1 if width.group_size == -1 else -(-in_features // width.group_size)
    scales = groups * out_features * 2
    if layout in ("gptq", "gptq_v2"):
        return LinearBytes(values * bits // 8, scales, groups * out_features * bits // 8, in_features * 4)
    if layout == "awq_gemm":
        return LinearBytes(values // 2, scales, groups * out_features // 2)
    if layout == "awq_gemv":
        words = zeros_width(in_features, width.group_size)
        return LinearBytes(values // 2, out_features * 8 * words * 2, out_features * words * 4)
    if layout == "compressed_tensors":
        fields = 32 // bits
        zeros = 0 if symmetric else -(-out_features // fields) * groups * 4
        return LinearBytes(out_features * -(-in_features // fields) * 4, scales, zeros, 16)
    if layout == "compressed_tensors_int":
        return LinearBytes(values, out_features * 2)
    if layout == "bitsandbytes":
        if bits == 8:
            return LinearBytes(values, out_features * 4, other=1)
        blocks = -(-values // width.group_size)
        if not double_quant:
            return LinearBytes(values // 2, blocks * 4, other=16 * 4)
        return LinearBytes(values // 2, blocks + -(-blocks // 256) * 4, other=(16 + 256) * 4)
    if layout.startswith("msmodelslim"):
        packed = bits == 4 and layout != "msmodelslim"
        return LinearBytes(values // 2 if packed else values, scales, scales)
    raise ValueError(f"no layout named {layout}")
