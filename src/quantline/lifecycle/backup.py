"""Backup of a checkout's outputs and measurements. See `restore` for the way back into an empty clone.

    DIR/objects/md5/ab/cdef...        DVC's objects, by their MD5
    DIR/objects/sha256/ab/cdef...     everything else, by its SHA-256
    DIR/snapshots/<time>.json         one backup: names, hashes, sizes

Every object is hashed while it is copied, and the snapshot's file is written last, so an existing snapshot is complete.
Another backup into the same folder copies only new objects. A restore first checks and stages everything, then moves it
into place, dvc.lock last. If it is killed while moving, the next restore completes it. Why not `dvc push`:
docs/decisions/0017.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import clear, replaced, room, sha256_of, write_json
from quantline.lifecycle.promoted import require_whole
from quantline.lifecycle.storage import dvc_cache, dvc_lock
from quantline.pipeline.dvc_config import cache_folder
from quantline.pipeline.git import commit_of, untracked, whole_patch

SCHEMA = 1
FILES = ("params.yaml", "dvc.yaml", "dvc.lock")
DATABASE, ARTIFACTS, PATCH = "mlflow.db", "mlartifacts", "backup.patch"


@dataclass(frozen=True)
class Saved:
    """A finished backup. copied: number of new objects. left_out: files that git neither tracks nor ignores."""

    snapshot: Path
    objects: int
    bytes: int
    copied: int
    left_out: tuple[str, ...]


def backup(root: Path, to: Path, *, also: Mapping[str, str] = MappingProxyType({})) -> Saved:
    """Save dvc.lock's outputs, params.yaml, and MLflow's embedded store; `to` may contain earlier backups.

    also: what promoted variants need, as `promoted` gives it; what the cache lacks of it is brought from a remote.

    Raises:
        UserError: an object is missing or damaged (see `stages.verify`), dvc.lock lacks a stage, a `dvc` command is working,
            or `to` lies in the checkout.
        DiskFullError: the disk is full.
    """
    root, to = root.resolve(), to.expanduser().resolve()
    if to == root or root in to.parents:
        raise UserError(f"to={to}: lies in the checkout; give a folder outside of it, if possible on another disk")
    cache = cache_folder(root)
    store = _Store(to)
    with room(to):
        with dvc_lock.held(root):  # the saved dvc.lock is the one whose objects are saved
            dvc_lock.require_whole(root)
            needed = [output.md5 for output in dvc_lock.read_lock(root)]
            to.mkdir(parents=True, exist_ok=True)
            files = {name: store.keep(root / name) for name in FILES if (root / name).is_file()}
        with dvc_cache.opened(root) as repo:
            promoted = require_whole(repo, cache, also)
        for md5 in sorted(dvc_cache.objects_of(cache, needed) | promoted):
            store.keep_md5(dvc_cache.object_path(cache, md5), md5)
        files.update(_tracking_files(root, store))
        commit, dirty = commit_of(root)
        patch = whole_patch(root, FILES) if dirty else b""  # those of FILES are saved whole
        if patch:
            files[PATCH] = store.keep_bytes(patch)
        manifest = {
            "schema": SCHEMA, "root": str(root), "commit": commit, "md5": store.md5, "files": files,
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        snapshot = to / "snapshots" / f"{_stamp(to)}.json"
        write_json(snapshot, manifest)
    left_out = [name for name in untracked(root) if name not in files]
    return Saved(snapshot, len(store.md5) + len(files), store.bytes, store.copied, tuple(left_out))


def _stamp(to: Path) -> str:
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    taken = len(list((to / "snapshots").glob(f"{now}*.json")))
    return f"{now}-{taken}" if taken else now


def _tracking_files(root: Path, store: _Store) -> dict[str, dict[str, Any]]:
    database = root / DATABASE
    if not database.is_file():
        return {}
    files = {}
    with tempfile.TemporaryDirectory(prefix="quantline-backup-") as scratch:
        copy = Path(scratch) / DATABASE
        # SQLite's online backup gives a consistent copy, even during a publish.
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        files[DATABASE] = store.keep(copy)
    for path in sorted(path for path in (root / ARTIFACTS).rglob("*") if path.is_file()):
        files[path.relative_to(root).as_posix()] = store.keep(path)
    return files


class _Store:
    """The objects of a backup folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.md5: dict[str, int] = {}
        self.bytes = self.copied = 0

    def keep_md5(self, path: Path, md5: str) -> None:
        if not path.is_file():
            raise UserError(f"{path}: is missing, but dvc.lock needs it; see `python -m stages.verify`")
        target = self._folder / "objects" / "md5" / md5[:2] / md5[2:]
        if not target.is_file():
            fault = "is damaged, its hash is {found}; see `python -m stages.verify`"
            copy_hashed(path, target, "md5", md5.removesuffix(dvc_cache.DIR), fault)
            self.copied += 1
        self.md5[md5] = target.stat().st_size
        self.bytes += self.md5[md5]

    def keep(self, path: Path) -> dict[str, Any]:
        sha256, size = sha256_of(path), path.stat().st_size
        target = self._folder / "objects" / "sha256" / sha256[:2] / sha256[2:]
        if not target.is_file():
            copy_hashed(path, target, "sha256", sha256, "changed while it was copied; run the backup again")
            self.copied += 1
        self.bytes += size
        return {"sha256": sha256, "size": size}

    def keep_bytes(self, content: bytes) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="quantline-backup-") as scratch:
            path = Path(scratch) / "content"
            path.write_bytes(content)
            return self.keep(path)


def copy_hashed(source: Path, target: Path, kind: str, wanted: str, fault: str) -> None:
    """Copy a file completely or not at all, and hash the written bytes.

    kind: of hash, md5 or sha256. wanted: the expected hash in hexadecimal. fault: message for another hash, in which
    `{found}` stands for that hash.

    Raises:
        UserError: the content has another hash; no copy is left then.
    """
    digest = hashlib.new(kind, usedforsecurity=False)
    with replaced(target) as temporary, source.open("rb") as read, temporary.open("wb") as write:
        while block := read.read(2**20):
            digest.update(block)
            write.write(block)
        if digest.hexdigest() != wanted:
            raise UserError(f"{source}: {fault.format(found=digest.hexdigest())}")


def read_snapshot(folder: Path, name: str | None) -> tuple[Path, dict[str, Any]]:
    """A snapshot's file and content; the latest if no name is given.

    Raises:
        UserError: there is none, or it is damaged.
    """
    there = sorted((folder / "snapshots").glob("*.json"))
    if not there:
        raise UserError(f"from={folder}: contains no backup; `python -m stages.backup to={folder}` makes one")
    path = folder / "snapshots" / f"{name}.json" if name else there[-1]
    if not path.is_file():
        raise UserError(f"snapshot={name}: does not exist; there are {', '.join(path.stem for path in there)}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise UserError(f"{path}: has schema {manifest['schema']}, but this version reads {SCHEMA}")
        return path, {**manifest, "md5": dict(manifest["md5"]), "files": dict(manifest["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); give another snapshot=NAME") from error


def object_file(folder: Path, kind: str, name: str) -> Path:
    """The file of an object of a backup."""
    return folder / "objects" / kind / name[:2] / name[2:]


def check_objects(folder: Path, manifest: dict[str, Any]) -> int:
    """Read and hash everything that a snapshot needs; returns the number of bytes.

    Raises:
        UserError: objects are missing or damaged; the message lists all of them.
    """
    faults, size = [], 0
    wanted = [("md5", md5) for md5 in manifest["md5"]]
    wanted += sorted({("sha256", str(entry["sha256"])) for entry in manifest["files"].values()})
    for kind, name in wanted:
        path = object_file(folder, kind, name)
        if not path.is_file():
            faults.append(f"{path} is missing")
            continue
        size += path.stat().st_size
        found = dvc_cache.md5_of(path) if kind == "md5" else sha256_of(path)
        if found != name.removesuffix(dvc_cache.DIR):
            faults.append(f"{path} is damaged")
    if faults:
        shown = "\n  ".join(faults)
        raise UserError(
            f"from={folder}: the backup is incomplete, nothing was restored:\n  {shown}\nGive another snapshot=NAME, or "
            "remove the damaged files and run the backup again in the original checkout"
        )
    return size


def remove_stale(folder: Path) -> None:
    """Remove what a killed backup left in a backup's own folders; other files in `folder` stay."""
    for own in [folder / "snapshots", *(folder / "objects").glob("*/*")]:
        clear(own)
