"""What GPTQModel and defuser use of PyPcre, by the standard library's `re`.

PyPcre has no wheels, and with it the environment could be built only where there is a C compiler. The patterns of these
libraries, and those that this project gives to them, are ones that both engines read alike.
"""

import enum
import re
from re import Match, Pattern, compile, escape, findall, finditer, fullmatch, match, search, split, sub, subn

__all__ = [
    "Flag", "Match", "Pattern", "compile", "escape", "findall", "finditer", "fullmatch", "match", "search", "split", "sub",
    "subn",
]  # fmt: skip


class Flag(enum.IntFlag):
    """PCRE's names of the flags."""

    CASELESS = re.IGNORECASE
    MULTILINE = re.MULTILINE
    DOTALL = re.DOTALL
    EXTENDED = re.VERBOSE
