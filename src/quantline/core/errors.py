"""Errors that a user can fix.

Every message says what was given, what is allowed and what to do. The stage entrypoints print it without a traceback and
exit with `exit_code`. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class QuantlineError(Exception):
    """A failure with a message meant for the user."""

    exit_code = 1


@contextmanager
def naming(folder: Path, name: str, joint: str = "/") -> Iterator[None]:
    """Call `folder` by another name in the messages of errors of the block: one that exists when the message is read.

    joint: between the name and a file of the folder.
    """
    try:
        yield
    except Exception as error:  # whichever it is, it passes on with its type and traceback
        error.args = tuple(
            given.replace(f"{folder}/", f"{name}{joint}").replace(str(folder), name)
            if isinstance(given, str)
            else given
            for given in error.args
        )
        raise


class UserError(QuantlineError):
    """Something the user gave cannot work: a value, a file, a combination."""

    exit_code = 2


class ConfigError(UserError):
    """One or more faults of a configuration; all of them are collected before it is raised.

    remedy: what mends them all at once, if that is known.
    """

    def __init__(self, faults: Sequence[str], remedy: str = "") -> None:
        self.faults = tuple(faults)
        head = "the configuration has a fault" if len(faults) == 1 else f"the configuration has {len(faults)} faults"
        super().__init__("\n".join([f"{head}:", *(f"  {fault}" for fault in faults), *([remedy] if remedy else [])]))


class DiskFullError(UserError):
    """The disk has no room for the output."""

    exit_code = 1


class DifferentError(QuantlineError):
    """A rebuilt result differs from its record."""


class GateError(QuantlineError):
    """A variant does not meet the requirements of its promotion."""


class WorkerError(QuantlineError):
    """A worker process failed; the message names its log."""


class ServerError(QuantlineError):
    """The inference server could not be started, died or gave an invalid answer."""


class TrackingError(QuantlineError):
    """The tracking server could not be reached; it never fails a stage."""

    exit_code = 75  # EX_TEMPFAIL: the same command may work later


class CheckpointError(UserError, ValueError):
    """A checkpoint is damaged or inconsistent. The message names the file, the fault and the remedy."""
