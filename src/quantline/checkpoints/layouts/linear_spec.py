"""How a linear is quantized, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSpec:
    """How a linear is quantized: bits of a weight, input columns that share a scale (-1: all)."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class LayerSettings:
    """How one quantized linear is stored: bits, group size (-1 per output channel), and whether zeros are middle."""

    bits: int
    group_size: int
    symmetric: bool
