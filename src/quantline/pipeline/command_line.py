"""Options that belong to one command and not to the configuration: taken off the command line before Hydra sees it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

from quantline.core.errors import QuantlineError, UserError
from quantline.core.text import nearest


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


def read_words(given: Sequence[str], allowed: Mapping[str, str | None]) -> dict[str, str | None]:
    """The words by key, those not given at their default.

    Raises:
        UserError: a word is none, or its key is not allowed.
    """
    words = dict(allowed)
    for word in given:
        key, mark, value = word.partition("=")
        if not mark or key not in allowed:
            options = ", ".join(f"{name}={default or '...'}" for name, default in allowed.items())
            raise UserError(f"{word}: is no option{nearest(key, list(allowed))}; give KEY=VALUE of {options or 'none'}")
        words[key] = value
    return words


def is_true(key: str, value: str | None) -> bool:
    """A word that is true or false.

    Raises:
        UserError: it is neither.
    """
    if value not in ("true", "false"):
        raise UserError(f"{key}={value}: give true or false")
    return value == "true"


def run_words(
    work: Callable[[dict[str, str | None]], int], about: str | None, allowed: Mapping[str, str | None]
) -> NoReturn:
    """Run an entrypoint; a user's mistake ends in a message and an exit code, Ctrl-C in 130.

    work: gets the words, returns the exit code. about: what --help prints.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((about or "").strip())
        sys.exit(0)
    try:
        sys.exit(work(read_words(sys.argv[1:], allowed)))
    except KeyboardInterrupt:
        print("interrupted; nothing half written was left", file=sys.stderr)
        sys.exit(130)
    except QuantlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
