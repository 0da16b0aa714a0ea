"""Text of messages and reports: lists of alternatives, readable numbers and sizes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence


def nearest(word: str, allowed: list[str]) -> str:
    """A suggestion such as ` (did you mean X?)`, or an empty string."""
    matches = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def alternatives(values: Iterable[object]) -> str:
    """`a, b or c`, each value as it is written in a configuration."""
    return _joined([as_configured(value) for value in values], "or")


def as_configured(value: object) -> str:
    """A value as it is written in a configuration."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return _joined(words, "and")


def _joined(words: Sequence[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def digits(number: float, significant: int) -> str:
    """A number with this many significant digits; very large and small ones have an exponent."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    if abs(number) >= 1e6 or abs(number) < 1e-4:
        return f"{number:.{significant - 1}e}"
    return f"{number:.{max(0, significant - 1 - math.floor(math.log10(abs(number))))}f}"


def percent(share: float, decimals: int = 1, *, sign: bool = False) -> str:
    """A share for reading: 0.267 is `26.7 %`."""
    return f"{100 * share:{'+' if sign else ''}.{decimals}f} %"


def counted(number: float, noun: str) -> str:
    """`1 token`, `2 tokens`, `1.5 tokens`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def decimal_size(count: float) -> str:
    """Bytes in powers of ten, with three digits: for measurements of files and processes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{digits(count / size, 3)} {unit}"
    return f"{count:.0f} B"


def binary_size(count: int) -> str:
    """Bytes in powers of two: for memory sizes and limits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"
