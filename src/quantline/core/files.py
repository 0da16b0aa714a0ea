"""Atomic writes of files and folders, JSON files, and hashes of files."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantline.core.errors import CheckpointError, DiskFullError, naming

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARK, _LOCK, _FORMER = ".partial-", ".lock", ".former"
_own: dict[Path, int | None] = {}  # this process's partial folders, with the descriptors of their locks
_count = itertools.count()


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
def partial(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` in which this process makes it; it is removed when the block ends.

    It is `.<name>.partial-<host>-<number>`. The process holds a lock on a file in it, which the kernel gives back however
    the process ends. So `clear` removes what killed processes left, and nothing that a living one makes.

    Raises:
        OSError: the disk failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path.parent, path.name)
    folder = None
    while folder is None:
        folder = _owned(path.with_name(f".{path.name}{_MARK}{socket.gethostname()}-{os.getpid()}{next(_count)}"))
    try:
        yield folder
    finally:
        _release(folder)


def _restore(folder: Path, out: Path) -> None:
    """Put the former `out` back, where `building` ended between its two renames."""
    if (folder / _FORMER).exists() and not out.exists():
        os.replace(folder / _FORMER, out)


def _owned(folder: Path) -> Path | None:
    """Make a folder and lock it; None if another process took it away in between, or left one of that name."""
    _own[folder] = None
    try:
        folder.mkdir()
        _own[folder] = lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        with suppress(OSError):  # a file system without locks: nobody clears there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():
            return folder
    except (FileExistsError, FileNotFoundError):
        pass
    except BaseException:
        _release(folder)
        raise
    _forget(folder)
    return None


def _forget(folder: Path) -> None:
    lock = _own.pop(folder, None)
    if lock is not None:
        os.close(lock)


def _release(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _forget(folder)


def release(path: Path) -> None:
    """Remove what this process began to make for `path`. For where an interrupt came while a block was being entered."""
    for folder in list(_own):
        if folder.parent == path.parent and folder.name.startswith(f".{path.name}{_MARK}"):
            _release(folder)


def clear(folder: Path, name: str | None = None) -> list[Path]:
    """Remove the partial folders directly in `folder` that no living process owns; those of other hosts stay.

    name: of the file or folder that was to be made; null is any.

    Returns:
        what was removed.
    """
    begin, removed = f"{_MARK}{socket.gethostname()}-", []
    for place in sorted(folder.glob(f".{glob.escape(name) if name else '*'}{glob.escape(begin)}*")):
        made, _, number = place.name.partition(begin)
        if place in _own or not number.isdigit():  # `a-1` is another host than `a`
            continue
        with suppress(OSError):  # it is gone, another user's, or a living process holds its lock
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _restore(place, place.with_name(made[1:]))
                shutil.rmtree(place, ignore_errors=True)
                removed.append(place)
            finally:
                os.close(lock)
    return removed


def foreign(folder: Path) -> list[Path]:
    """The partial folders directly in `folder` of other hosts, which this one cannot know to be dead."""
    own = re.compile(rf".*{re.escape(_MARK + socket.gethostname())}-\d+")
    return [place for place in sorted(folder.glob(f".*{_MARK}*")) if not own.fullmatch(place.name)]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to `path` if the block succeeds, and removed otherwise.

    The content reaches the disk before the new name does, so a reader never sees half a file. An older file and
    its hard links keep their content until then. Two processes may write the same file at once: the last one wins.

    Raises:
        OSError: the disk failed, or the block wrote no file.
    """
    with partial(path) as folder:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
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
def building(out: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `out` if the block succeeds, and removed otherwise.

    An existing `out` stays as it is until then. Errors of the block name `out`, not the folder that is removed.

    Raises:
        DiskFullError: the disk is full.
    """
    with room(out.parent), partial(out) as folder:
        made = folder / out.name
        made.mkdir()
        with naming(made, str(out)):
            yield made
        try:
            if out.exists():
                os.replace(out, folder / _FORMER)
            os.replace(made, out)
        except BaseException:
            _restore(folder, out)
            raise


def to_be_made(path: Path | str) -> str:
    """What a path below a folder of `partial` is to become, for messages; other paths stay as they are."""
    return re.sub(rf"/\.([^/]+){re.escape(_MARK)}[^/]+(/.*)?$", _without_partial, str(path))


def _without_partial(found: re.Match[str]) -> str:
    name, below = found.group(1), found.group(2) or ""
    # A file or folder of that name in it is the one that is moved to it.
    return f"/{name}{below.removeprefix(f'/{name}')}"


def disk_full(folder: Path) -> DiskFullError:
    """The error for a full disk below `folder`."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return DiskFullError(
        f"{to_be_made(folder)}: the disk is full ({free / 2**30:.2f} GiB free); make room and run it again"
    )


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


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content; the two share their blocks until one is written to, where the file system can do that.

    Raises:
        OSError: as of any copy.
    """
    with source.open("rb") as origin, target.open("wb") as copy:
        left = os.fstat(origin.fileno()).st_size
        try:
            while left > 0 and (done := os.copy_file_range(origin.fileno(), copy.fileno(), left)):
                left -= done
        except OSError as error:
            # Two file systems, or one that cannot; a full disk is told as it is.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            shutil.copyfileobj(origin, copy, 2**20)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=True)
        file.write("\n")
