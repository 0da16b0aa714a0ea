"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantline.errors import DiskFullError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Where the disk of `folder` has no room for what the block writes, that is said.

    Raises:
        DiskFullError: that.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(folder) from error
        raise


@contextmanager
def passing(folder: Path) -> Iterator[Path]:
    """An empty `folder` for the time of the block; what is in it afterwards, or was before, is gone.

    Raises:
        DiskFullError: that.
    """
    try:
        with room(folder.parent):
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """An empty folder `<out>.tmp` that becomes `out` when the block ends well, and vanishes when it does not.

    An `out` that exists already stays as it is until then.

    Raises:
        DiskFullError: that.
    """
    old = out.with_name(out.name + ".old")
    with passing(out.with_name(out.name + ".tmp")) as temporary:
        if old.exists() and not out.exists():  # an earlier run was killed between the two renames below
            os.replace(old, out)
        shutil.rmtree(old, ignore_errors=True)
        yield temporary
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)


def disk_full(folder: Path) -> DiskFullError:
    """The error for a disk without room for what goes to `folder`."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return DiskFullError(f"{folder}: the disk is full ({free / 2**30:.2f} GiB free); make room and run it again")
