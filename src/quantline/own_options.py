"""Options that belong to one command and not to the configuration: taken off the command line before Hydra sees it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from quantline.errors import UserError


def split_own(arguments: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """A command's own options, KEY=VALUE by key, and the arguments that are left for Hydra.

    Raises:
        UserError: an option is given twice, or without a value.
    """
    own: dict[str, str] = {}
    rest = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in names:
            rest.append(argument)
            continue
        if key in own or not value:
            raise UserError(f"{argument}: give {key}=VALUE, once")
        own[key] = value
    return own, rest


def required(own: dict[str, str], *keys: str) -> list[str]:
    """The values of options that have to be given.

    Raises:
        UserError: one is not.
    """
    missing = [key for key in keys if key not in own]
    if missing:
        raise UserError(f"{missing[0]}: is not set; give {' '.join(f'{key}=...' for key in keys)}")
    return [own[key] for key in keys]


def chosen(own: dict[str, str], key: str, allowed: Sequence[str]) -> str:
    """The value of an option that takes one of a few; the first of them where it is not given.

    Raises:
        UserError: it takes no such value.
    """
    value = own.get(key, allowed[0])
    if value not in allowed:
        raise UserError(f"{key}={value}: allowed are {', '.join(allowed)}")
    return value
