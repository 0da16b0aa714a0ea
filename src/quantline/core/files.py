"""Atomic writes of files and folders, JSON files, and hashes of files."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantline.core.errors import CheckpointError, DiskFullError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Report a full disk while the block writes to `folder`.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(folder) from error
        raise


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to `path` if the block succeeds, and removed otherwise.

    The content reaches the disk before the new name does, so a reader never sees half a file. An older file and
    its hard links keep their content until then. Two processes may write the same file at once: the last one wins.

    Raises:
        OSError: the disk failed, or the block wrote no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        number = stale.name.removesuffix(".tmp").rpartition(".")[2]
        if number == str(os.getpid()) or not (number.isdigit() and alive(int(number))):
            stale.unlink(missing_ok=True)  # of a process that was killed
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems cannot sync a folder
        _sync(path.parent)  # a rename reaches the disk only when its folder does


def alive(pid: int) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def passing(folder: Path) -> Iterator[Path]:
    """An empty `folder` that exists during the block. An existing one is removed first.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        with room(folder.parent):
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """An empty folder `<out>.tmp` that is renamed to `out` if the block succeeds, and removed otherwise.

    An existing `out` stays as it is until then.

    Raises:
        DiskFullError: the disk is full.
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
    """The error for a full disk below `folder`."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return DiskFullError(f"{folder}: the disk is full ({free / 2**30:.2f} GiB free); make room and run it again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable JSON ({error}): fetch or write it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object: fetch or write it again")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice")
    return keys


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=True)
        file.write("\n")
