"""Keeps DVC's cache whole where outputs are hard links to it.

DVC links an output to its object in the cache where .dvc/config allows it, and makes both read-only. An owner can still
write into the file, and so can root, as whom containers run. The object then holds something else than its name says, and
DVC 3.67 takes read-only objects for unchanged: it would put the wrong bytes back under the right name. An object that is
linked is therefore looked at before DVC uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from quantline.core.files import replaced
from quantline.lifecycle.storage.dvc_cache import DIR, all_objects, described, md5_of, object_path
from quantline.pipeline.dvc_config import cache_folder
from quantline.pipeline.linked import keep, mark_of, marks

# DVC's configuration of this machine, which git ignores.
LOCAL = Path(".dvc", "config.local")
_REFLINKS = '[cache]\n    type = "reflink,copy"\n'


def drop_damaged(root: Path) -> list[str]:
    """Remove linked objects whose content is not what their name says from the cache; return which outputs they are.

    An object that is as a stage left it by size, time and inode is not read. DVC makes again what it then lacks.

    Raises:
        UserError: the folder is not a DVC project, or DVC's configuration cannot be read.
    """
    cache = cache_folder(root)
    known, good, damaged = marks(cache), set(), []
    for name in all_objects(cache):
        path = object_path(cache, name)
        stat = path.stat()
        if stat.st_nlink == 1:
            continue
        mark = mark_of(stat)
        if mark in known or md5_of(path) == name.removesuffix(DIR):
            good.add(mark)
        else:
            damaged.append(name)
    if good != known:
        keep(cache, good)
    told = described(cache, damaged)
    inodes = {object_path(cache, name).stat().st_ino: name for name in damaged}
    for path in _files(root) if damaged else ():
        if (inode := path.stat().st_ino) in inodes:
            told[inodes[inode]] = path.relative_to(root).as_posix()
    for name in damaged:
        object_path(cache, name).unlink()
    return [told[name] for name in damaged]


def _files(root: Path) -> Iterator[Path]:
    """The files of a checkout that can be outputs."""
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    inside = (path for folder in folders for path in folder.rglob("*"))
    return (path for path in (*root.iterdir(), *inside) if path.is_file() and not path.is_symlink())


def shares_blocks(folder: Path) -> bool:
    """Whether files in a folder can share their blocks until one is written to: reflinks, as on btrfs and XFS."""
    from dvc_objects.fs.system import reflink

    source, target = (folder / f".reflink-{os.getpid()}{end}" for end in ("", "-copy"))
    try:
        source.write_bytes(b"blocks")
        reflink(str(source), str(target))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    return True


def prefer_reflinks(root: Path) -> bool:
    """Let DVC take reflinks, which no write can spoil, where the file system has them; return whether it does now.

    What .dvc/config.local says already stays.
    """
    local = root / LOCAL
    text = local.read_text(encoding="utf-8") if local.is_file() else ""
    if "[cache]" in text or not (root / ".dvc").is_dir() or not shares_blocks(root / ".dvc"):
        return False
    with replaced(local) as temporary:
        temporary.write_text(text + _REFLINKS, encoding="utf-8")
    return True
