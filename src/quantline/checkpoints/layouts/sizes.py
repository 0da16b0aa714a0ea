"""Bytes of one linear."""

from __future__ import annotations

from dataclasses import dataclass


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
        """Bytes of all tensors."""
        return self.codes + self.scales + self.zeros + self.other
