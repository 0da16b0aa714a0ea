"""Shared by all commands: a command's own options, and its error handling.

A command's own options are written NAME=VALUE, like Hydra's overrides (docs/decisions/0016). They are removed from the
command line before Hydra reads the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantline.core.errors import UserError
from quantline.core.text import nearest

_OURS = ("quantline", "stages")


@dataclass(frozen=True)
class Option:
    """An option of one command.

    value: placeholder for its value, such as DIR. about: one line for --help. default: None where it is optional.
    allowed: the values that it accepts, any if empty; the first is the default. bare: VALUE without NAME= is accepted.
    """

    name: str
    value: str
    about: str
    default: str | None = None
    required: bool = False
    allowed: tuple[str, ...] = ()
    bare: bool = False

    @property
    def told(self) -> str:
        """What it does, with the values that it accepts, the default first."""
        if not self.allowed or set(self.allowed) == {"true", "false"}:
            return self.about
        return f"{self.about} ({self.allowed[0]}, or {', '.join(self.allowed[1:])})"

    @property
    def shown(self) -> str:
        """The option as a user writes it."""
        return f"{self.name}={self.value}"


def read(
    arguments: Sequence[str], options: Sequence[Option], *, configured: bool
) -> tuple[dict[str, str | None], list[str]]:
    """The values of a command's own options by name, and the remaining arguments.

    configured: the remaining arguments are for Hydra. A command without a configuration allows none.

    Raises:
        UserError: an option is given twice, without a value or with a value that is not allowed, is missing or unknown.
    """
    known = {option.name: option for option in options}
    bare = next((option.name for option in options if option.bare), "")
    given: dict[str, str] = {}
    rest = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals and bare and not argument.startswith("-"):
            name, value = bare, argument
        elif not equals or name not in known:
            rest.append(argument)
            continue
        if name in given or not value:
            raise UserError(f"{argument}: give {name}=VALUE, once")
        allowed = known[name].allowed
        if allowed and value not in allowed:
            raise UserError(f"{name}={value}: allowed are {', '.join(allowed)}")
        given[name] = value
    if rest and not configured:
        shown = ", ".join(option.shown for option in options)
        raise UserError(
            f"{rest[0]}: no such option{nearest(rest[0].partition('=')[0], list(known))}; "
            + (f"give NAME=VALUE of {shown}" if options else "this command has no options")
        )
    required = [option for option in options if option.required]
    missing = [option.name for option in required if option.name not in given]
    if missing:
        raise UserError(f"{missing[0]}: is not set; give {' '.join(option.shown for option in required)}")
    defaults = {name: option.allowed[0] if option.allowed else option.default for name, option in known.items()}
    return {**defaults, **given}, rest


def help_asked(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for the help of the command; --help=all asks for that of the whole configuration."""
    return "--help" in arguments or "-h" in arguments


@contextmanager
def ending(conf: Path) -> Iterator[None]:
    """Wraps a command: turns an exception from the block into a message and an exit code.

    conf: the folder of configurations, for messages that name options. Ctrl-C and SIGTERM exit with 130.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; nothing half written was left", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # the outermost handler: only the shell is above it
        sys.exit(report(error, conf))


def report(error: Exception, conf: Path) -> int:
    """Print the message for a failure and return its exit code; a bug in Quantline prints its traceback."""
    if isinstance(error, BrokenPipeError):  # `| head` has read enough; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, ModuleNotFoundError) and (error.name or "quantline").partition(".")[0] not in _OURS:
        print(
            f"error: {error.name} is not installed here; run `make setup`, then `source .venv/bin/activate`",
            file=sys.stderr,
        )
        return 1
    from quantline.pipeline.user_messages import explain

    explained = explain(error, conf)
    if explained is None:
        traceback.print_exception(error)
        return 70  # EX_SOFTWARE
    print(f"error: {explained[0]}", file=sys.stderr)
    return explained[1]
