"""Errors of a conversion."""

from __future__ import annotations

from collections.abc import Sequence

from quantline.core.errors import QuantlineError, UserError


class ConversionError(UserError):
    """All reasons against a conversion together; nothing was written."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(dict.fromkeys(faults))
        count = "one reason" if len(self.faults) == 1 else f"{len(self.faults)} reasons"
        head = f"the checkpoint cannot be converted, for {count}; nothing was written:"
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults)]))


class ProofError(QuantlineError):
    """The output does not read back as the source; it is removed."""
