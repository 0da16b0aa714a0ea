"""The layouts that can be written, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from quantline.checkpoints.layouts import AffineLinear, Tensors
from quantline.checkpoints.layouts.msmodelslim import codec

MSMODELSLIM = "msmodelslim"
MSMODELSLIM_PACKED = "msmodelslim_ascend_v1"
# Layouts whose readers keep scales in float16; compressed-tensors and msModelSlim hold them as they are.
HALF_SCALES = ("awq_gemm", "awq_gemv", "gptq", "gptq_v2")
# Layouts that know linears of several kinds in one checkpoint.
_MIXED = ("compressed_tensors", MSMODELSLIM, MSMODELSLIM_PACKED)


def family(layout: str) -> str:
    """awq, gptq, compressed or msmodelslim."""
    return layout.split("_", maxsplit=1)[0]


def holds_mixed(layout: str) -> bool:
    """Whether linears of one checkpoint may differ in bits and group size."""
    return layout in _MIXED


class _MsModelSlim:
    """msModelSlim in one save mode, whose tensors alone do not say whether they are packed."""

    def __init__(self, name: str, packed: bool) -> None:
        self.NAME, self.packed = name, packed
        self.TENSORS: Mapping[str, bool] = codec.TENSORS

    def read(self, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
        """Raises what `msmodelslim.read` raises."""
        own = -1 if tensors["weight_scale"].shape[-1] == 1 else group_size
        return codec.read(tensors, bits=bits, group_size=own, packed=self.packed and bits == 4)

    def write(self, linear: AffineLinear) -> dict[str, NDArray[Any]]:
        """One group over the whole input is told by its one scale a channel; raises what `msmodelslim.write` raises."""
        own = replace(linear, group_size=-1) if linear.groups == 1 else linear
        return codec.write(own, packed=self.packed and linear.bits == 4)
