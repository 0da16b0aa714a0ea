"""Entrypoints that take a few words `key=value` and compose no configuration."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from quantline.config import nearest
from quantline.errors import QuantlineError, UserError


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
