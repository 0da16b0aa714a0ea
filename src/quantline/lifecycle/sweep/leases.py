"""What jobs on one machine share by turns: GPUs, a number of jobs at the same time, and quiet for measuring the speed.

Leases are locks on files of this machine, so they end with the process that holds them, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quantline.core.errors import UserError

_WAIT_SECONDS = 0.2


def _machine_folder() -> Path:
    # Not TMPDIR: whoever sets another one shares the machine all the same.
    folder = Path("/tmp", f"quantline-leases-{os.getuid()}")  # noqa: S108
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def _locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Lock a file; yield whether it is locked."""
    with path.open("a") as file:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def quiet(*, alone: bool, of: str = "cpu") -> Iterator[None]:
    """Hold this machine for computing beside others, or alone, as measuring the speed needs it."""
    with _locked(_machine_folder() / f"quiet-{of}.lock", shared=not alone):
        yield


def gpus_of(variables: dict[str, str], found: Sequence[str]) -> list[str]:
    """The GPUs that a job may lease: those of CUDA_VISIBLE_DEVICES where it is set, else those that were found."""
    named = variables.get("CUDA_VISIBLE_DEVICES")
    return list(found) if named is None else [name for name in named.split(",") if name and name != "-1"]


@contextmanager
def leased(count: int, names: Sequence[str], kind: str) -> Iterator[tuple[str, ...]]:
    """Lease `count` of the named things, waiting for those that others hold.

    kind: what they are, for the files' names and messages.

    Raises:
        UserError: there are fewer.
    """
    if count > len(names):
        raise UserError(f"{kind}: a job asks for {count}, and this machine has {len(names)}; ask for fewer")
    while count:
        with ExitStack() as stack:
            held = []
            for name in names:
                if stack.enter_context(_locked(_machine_folder() / f"{kind}-{name}.lock", wait=False)):
                    held.append(name)
                if len(held) == count:
                    yield tuple(held)
                    return
        time.sleep(_WAIT_SECONDS)  # all or none: who holds a part of what it needs can wait for ever
    yield ()
