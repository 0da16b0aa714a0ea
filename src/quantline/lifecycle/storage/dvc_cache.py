"""DVC's cache: the objects with the content of the outputs. All other modules read it through this one.

An object's name is the MD5 of its content. The name of a folder's object ends with `.dir`; its content is a JSON list of
`md5` and `relpath` of the folder's files. The cache is read as files, since `verify` and `backup` must work where DVC
refuses to. This module never writes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.text import decimal_size

DIR = ".dir"
_MOST_OF_A_RESULT = 20_000_000
# Of DVC, and of the library by which it speaks SSH.
_TALKATIVE = ("dvc", "asyncssh")


@dataclass(frozen=True)
class Entry:
    """A file of an output: its path in the checkout, and the MD5 of its content."""

    path: str
    md5: str


@contextmanager
def opened(root: Path) -> Iterator[Any]:
    """The checkout as a DVC `Repo`, for uses of its remotes or git's history.

    Raises:
        UserError: it is not a DVC repository.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
    except DvcException as error:
        raise UserError(f"{root}: is not a DVC repository ({error}); clone it with git, or run `dvc init`") from error
    with closing(repo):
        yield repo


@contextmanager
def quiet() -> Iterator[None]:
    """Let DVC print errors alone: no progress bars, and no remarks on objects that it does not find."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def require_remote(config: Any, name: str) -> None:
    """Check that DVC's configuration has a remote of that name.

    Raises:
        UserError: it has none; the message names those that there are.
    """
    if name not in config["remote"]:
        known = ", ".join(config["remote"])
        raise UserError(
            f"remote={name}: DVC has no such remote; "
            + (f"there are {known}" if known else f"add it: dvc remote add {name} URL")
        )


def object_path(cache: Path, md5: str) -> Path:
    """The file of an object."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def all_objects(cache: Path) -> Iterator[str]:
    """The names of all objects in a cache, in order."""
    for path in sorted((cache / "files" / "md5").glob("??/*")):
        name = path.parent.name + path.name
        if len(name.removesuffix(DIR)) == 32 and path.is_file():
            yield name


def md5_of(path: Path) -> str:
    """MD5 of a file's content, as DVC names it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def entries_of(cache: Path, path: str, md5: str) -> list[Entry] | None:
    """The files of the object of `path`; None if its list of files is missing or damaged."""
    if not md5.endswith(DIR):
        return [Entry(path, md5)]
    try:
        text = object_path(cache, md5).read_bytes()
        if hashlib.md5(text, usedforsecurity=False).hexdigest() != md5.removesuffix(DIR):
            return None
        return [Entry(f"{path}/{item['relpath']}", str(item["md5"])) for item in json.loads(text)]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def described(cache: Path, md5s: Iterable[str]) -> dict[str, str]:
    """What each object is, for a reader: size, and name in a folder, a folder's files, or the stage whose result it is.

    A file is named by the folders whose lists are in the cache. Of an object that only a remote has, nothing is known.
    """
    names: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    for name in all_objects(cache):
        if name.endswith(DIR):
            entries = [Entry(entry.path.removeprefix("/"), entry.md5) for entry in entries_of(cache, "", name) or []]
            names.update((entry.md5, entry.path) for entry in entries)
            lists[name] = [entry.path for entry in entries]
    found = {}
    for md5 in md5s:
        path = object_path(cache, md5)
        if not path.is_file():
            found[md5] = "in the remote only"
        elif md5.endswith(DIR):
            files = lists.get(md5, [])
            more = f" and {len(files) - 2} more" if len(files) > 2 else ""
            found[md5] = (
                f"the list of a folder: {', '.join(files[:2])}{more}" if files else "the list of an empty folder"
            )
        else:
            size = path.stat().st_size
            found[md5] = f"{decimal_size(size)}, {names.get(md5) or _result(path, size) or 'a single file'}"
    return found


def _result(path: Path, size: int) -> str:
    """Whose result a file is; empty if it is none."""
    try:
        value = json.loads(path.read_bytes()) if size < _MOST_OF_A_RESULT else {}
        return f"the result of {value['stage']} of {value['variant']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def objects_of(cache: Path, md5s: Iterable[str]) -> set[str]:
    """The given objects, and the files of the folders among them if their lists are in the cache."""
    objects: set[str] = set()
    for md5 in md5s:
        objects.add(md5)
        objects.update(entry.md5 for entry in entries_of(cache, "", md5) or [])
    return objects
