"""Words for messages."""

from __future__ import annotations

import difflib


def nearest(word: str, allowed: list[str]) -> str:
    """A hint at the word that was meant, as ` (did you mean X?)`, or nothing."""
    matches = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
