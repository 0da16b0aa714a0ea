"""Which files are known to be as their stages wrote them, by size, time and inode.

An output and its object in DVC's cache may be one file of two names (`cache.type` in .dvc/config). A write into such an
output is a write into the cache, whose objects DVC takes for unchanged. `lifecycle.storage.linked` finds it by these marks,
which lie in the cache, since several checkouts may share it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from quantline.core.files import replaced
from quantline.pipeline.dvc_config import cache_folder

MARKS = "quantline-linked.json"


def mark_of(stat: os.stat_result) -> str:
    """What changes when a file is written to, and stays when it is renamed, linked or made read-only; its inode first."""
    return f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"


def marks(cache: Path) -> set[str]:
    """Those that are kept in a cache."""
    try:
        return set(json.loads((cache / MARKS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def keep(cache: Path, found: Iterable[str]) -> None:
    """Keep these marks and no others. A cache that cannot be written to keeps none: its objects are read again then."""
    with suppress(OSError), replaced(cache / MARKS) as temporary:
        temporary.write_text(json.dumps(sorted(found), indent=0), encoding="utf-8")


def keep_output(root: Path, paths: Iterable[Path]) -> None:
    """Keep the marks of what a stage has just written and hashed.

    A file that is an object already, as of another stage's output, keeps the mark that it had: it may have been written to
    since.

    Args:
        root: the checkout.
        paths: files and folders.

    Raises:
        UserError: the checkout is not a DVC project, or DVC's configuration cannot be read.
    """
    cache = cache_folder(root)
    known = marks(cache)
    objects = {mark.partition(":")[0] for mark in known}
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    stats = [file.stat() for file in files if file.is_file()]
    keep(cache, known | {mark_of(stat) for stat in stats if str(stat.st_ino) not in objects})
