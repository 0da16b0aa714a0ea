"""Formats values for readers: units, signs, significant digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantline.core.text import decimal_size, digits

MISSING = "not measured"
BASELINE = "baseline"
Kind = Literal[
    "text", "code", "hash", "number", "count", "bytes", "growth", "share", "percent", "seconds", "ms", "ratio", "yes",
    "nats", "plain",
]  # fmt: skip
_NUMERIC = frozenset(
    {"number", "count", "bytes", "growth", "share", "percent", "seconds", "ms", "ratio", "nats", "plain"}
)


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values, its heading, how they are written, and the keys of an interval's ends."""

    key: str
    label: str
    kind: Kind = "text"
    low: str | None = None
    high: str | None = None
    missing: str = MISSING

    @property
    def numeric(self) -> bool:
        """Whether it is right-aligned."""
        return self.kind in _NUMERIC

    def text(self, row: Mapping[str, Any]) -> str:
        """The cell of a row."""
        value = row.get(self.key)
        if value is None:
            return BASELINE if row.get("baseline") and self.missing == MISSING else self.missing
        shown = written(value, self.kind)
        low, high = (row.get(end) if end else None for end in (self.low, self.high))
        if low is None or high is None:
            return shown
        if self.kind == "growth":
            digits = _growth_digits(value, low, high)
            return f"{value:+.{digits}f} % [{low:+.{digits}f}, {high:+.{digits}f}]"
        return f"{shown} [{written(low, self.kind)}, {written(high, self.kind)}]"


def written(value: Any, kind: Kind) -> str:
    """One value.

    bytes: powers of ten. growth: per cent with sign. share: fraction, as per cent. percent: already per cent. ratio: times.
    yes: a boolean. hash: its prefix. plain: a number that may be a count, without trailing zeros.
    """
    if value is None:
        return MISSING
    if kind in ("text", "code"):
        return "yes" if value is True else "no" if value is False else str(value)
    if kind == "hash":
        return f"{str(value)[:12]}…"
    if kind == "yes":
        return "yes" if value else "no"
    number = float(value)
    if not math.isfinite(number):
        return "unbounded" if number > 0 else "none" if math.isnan(number) else "-unbounded"
    match kind:
        case "count":
            return f"{number:,.0f}".replace(",", " ")
        case "bytes":
            return decimal_size(number)
        case "growth":
            return f"{number:+.{_growth_digits(number)}f} %"
        case "share":
            return f"{100 * number:.{2 if number != 1 and abs(number - 1) < 0.0005 else 1}f} %"
        case "percent":
            return f"{digits(number, 3)} %"
        case "seconds":
            return f"{digits(number, 3)} s"
        case "ms":
            return f"{digits(number, 3)} ms"
        case "ratio":
            return f"{number:.2f}x"
        case "nats":
            return digits(number, 3)
        case "plain":
            return f"{number:.4g}"
        case _:
            return digits(number, 4)


def _growth_digits(*values: float) -> int:
    widest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 0 if widest >= 100 else 1 if widest >= 10 else 2 if widest >= 0.1 else 3
