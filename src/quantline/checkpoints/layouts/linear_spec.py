"""How a linear is quantized, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSpec:
    """How a linear is quantized: bits of a weight, input columns that share a scale (-1: all)."""

    bits: int
    group_size: int
