"""How a linear is quantized, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass

LM_HEAD = "lm_head"  # the output layer, as transformers names it


@dataclass(frozen=True)
class LinearSpec:
    """Bits of a weight, and the input columns that share a scale (-1: all).

    kind: which of a layout's types of these bits and groups, where it has several (the block types of GGUF).
    """

    bits: int
    group_size: int
    kind: str = ""


@dataclass(frozen=True)
class LayerSettings:
    """Bits and group size (-1: per output channel) of a quantized linear, and whether all zero points are the middle."""

    bits: int
    group_size: int
    symmetric: bool
