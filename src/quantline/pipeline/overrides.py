"""Overrides as they are typed: on the command line, and in the lines of params.yaml."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from quantline.core.errors import UserError

_HOME = re.compile(r"^([^=]+=)(~(?:/.*)?)$", re.DOTALL)


def key_of(override: str) -> str:
    """The option or group that an override sets: `bits` of `bits=8`, `method.sym` of `++method.sym=false`."""
    return override.partition("=")[0].lstrip("+")


def with_home(overrides: Sequence[str]) -> list[str]:
    """Overrides whose values may begin with the user's home, as in `model.path=~/model`: quoted, as Hydra needs it.

    A shell leaves `~` as it is there; what reads the path replaces it.
    """
    return [_HOME.sub(lambda found: found[1] + json.dumps(found[2], ensure_ascii=False), one) for one in overrides]


def split(line: object, where: str) -> list[str]:
    """The overrides of a line of text, quoted as in a shell.

    where: the line's place, for messages.

    Raises:
        UserError: it is not text, a quote does not close, or an option is given twice.
    """
    if line is not None and not isinstance(line, str):
        raise UserError(f"{where} is {line!r}; give overrides as one line of text")
    try:
        overrides = shlex.split(line or "")
    except ValueError as error:
        raise UserError(f"{where} is {line!r}: {error}; quote it as in a shell") from error
    refuse_repeated(overrides, f"{where}: ")
    return with_home(overrides)


def refuse_repeated(overrides: Sequence[str], where: str = "") -> None:
    """Refuse a line that says the same thing twice: Hydra takes the last without a word.

    where: begins the message.

    Raises:
        UserError: an option or group is given twice.
    """
    seen: dict[str, str] = {}
    for override in overrides:
        key = key_of(override)
        if "=" in override and key in seen:
            raise UserError(f"{where}{seen[key]} and {override}: both set {key}; keep one of them")
        seen[key] = override


def with_variant(overrides: Sequence[str], line: str) -> str:
    """What was typed, in a shell's quotes, with the options of another variant in place of those that describe this one.

    line: the other variant's method, and each option that differs.
    """
    words = line.split()
    instead = {"method", "bits", "group_size", *map(key_of, words)}
    kept = [
        shlex.quote(one) for one in overrides
        if "=" in one and not {key_of(one), key_of(one).partition(".")[0]} & instead
    ]  # fmt: skip
    return " ".join([*kept, *words])


def typed(overrides: Sequence[str], key: str) -> str | None:
    """The override that decides an option's value: the option's own, or that of its section or group; None if there is none.

    The option's own counts wherever it stands, as it does for Hydra.
    """
    setting = [override for override in overrides if key == key_of(override) or key.startswith(f"{key_of(override)}.")]
    return max(setting, key=lambda override: (len(key_of(override)), overrides.index(override)), default=None)
