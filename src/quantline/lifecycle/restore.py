"""Restore of a backup into an empty clone: check and stage everything first, then move it, dvc.lock last."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import room
from quantline.lifecycle.backup import (
    ARTIFACTS,
    DATABASE,
    PATCH,
    check_objects,
    copy_hashed,
    object_file,
    read_snapshot,
)
from quantline.lifecycle.storage import dvc_cache
from quantline.lifecycle.storage.dvc_lock import held
from quantline.pipeline.dvc_config import cache_folder
from quantline.pipeline.git import commit_of

STAGING = ".restore.tmp"
READY = "ready"  # a file in the staging folder: everything is complete and checked
# Tables and columns in which MLflow stores absolute URIs of artifacts; they change with the folder.
ADDRESSES = {
    "experiments": ("artifact_location",), "runs": ("artifact_uri",), "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}  # fmt: skip


@dataclass(frozen=True)
class Restored:
    """What was restored. notes: for the user."""

    snapshot: str
    objects: int
    files: int
    notes: tuple[str, ...]


def restore(root: Path, folder: Path, *, name: str | None = None) -> Restored:
    """Restore a snapshot into a clone without results; `dvc checkout` then fills the workspace.

    Raises:
        UserError: the backup is incomplete, or the clone already has results; nothing was changed then.
        DiskFullError: the disk is full; nothing was changed.
    """
    root, folder = root.resolve(), folder.expanduser().resolve()
    path, manifest = read_snapshot(folder, name)
    staging, cache = root / STAGING, cache_folder(root)
    if not (staging / READY).is_file() or (staging / READY).read_text(encoding="utf-8") != path.stem:
        _refuse_occupied(root, folder, manifest)
        check_objects(folder, manifest)
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with room(root):
                _stage(folder, manifest, staging, cache, root)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        (staging / READY).write_text(path.stem, encoding="utf-8")
    with held(root):
        _move(staging, root, list(manifest["files"]))
    return Restored(path.stem, len(manifest["md5"]), len(manifest["files"]), tuple(_notes(root, manifest)))


def _refuse_occupied(root: Path, folder: Path, manifest: dict[str, Any]) -> None:
    taken = [name for name in ("artifacts", "variants", DATABASE, ARTIFACTS) if _holds_something(root / name)]
    if taken:
        raise UserError(
            f"{root}: already has {', '.join(taken)}; a backup is restored into a fresh clone, so that nothing is lost: "
            "`git clone`, then run `python -m stages.restore` there"
        )
    for name, entry in manifest["files"].items():
        own = root / name
        if own.is_file() and _changed(root, name):
            same = own.read_bytes() == object_file(folder, "sha256", entry["sha256"]).read_bytes()
            if not same:
                raise UserError(f"{name}: has uncommitted changes that would be overwritten; commit or undo them")


def _holds_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _changed(root: Path, name: str) -> bool:
    from quantline.pipeline.git import git_output

    # A file that git does not track counts as changed; so does every file outside a git repository.
    status = git_output(root, "status", "--porcelain", "--ignored", "--", name)
    return status is None or bool(status.strip())


def _stage(folder: Path, manifest: dict[str, Any], staging: Path, cache: Path, root: Path) -> None:
    # Objects go directly to the cache: each is complete, and nothing refers to them until dvc.lock is moved.
    for md5 in manifest["md5"]:
        target = dvc_cache.object_path(cache, md5)
        if not (target.is_file() and dvc_cache.md5_of(target) == md5.removesuffix(dvc_cache.DIR)):
            target.unlink(missing_ok=True)
            _copy(object_file(folder, "md5", md5), target, "md5", md5.removesuffix(dvc_cache.DIR))
            target.chmod(0o444)  # as DVC does, since objects never change
    for name, entry in manifest["files"].items():
        inside = staging / "files" / name
        if not inside.resolve().is_relative_to(staging.resolve()):
            raise UserError(
                f"{name}: lies outside of the checkout; the snapshot is damaged, give another snapshot=NAME"
            )
        _copy(object_file(folder, "sha256", entry["sha256"]), inside, "sha256", entry["sha256"])
    database = staging / "files" / DATABASE
    if database.is_file():
        move_addresses(database, Path(manifest["root"]), root)


def _copy(source: Path, target: Path, kind: str, wanted: str) -> None:
    copy_hashed(source, target, kind, wanted, "changed during the restore; nothing was restored, run it again")


def move_addresses(database: Path, old: Path, new: Path) -> None:
    """Change the URIs of artifacts below `old` to URIs below `new`, in all rows or in none."""
    before, after = f"{old.as_uri()}/", f"{new.as_uri()}/"
    with closing(sqlite3.connect(database)) as store, store:
        for table, columns in ADDRESSES.items():
            known = {row[1] for row in store.execute(f"pragma table_info({table})")}
            for column in known.intersection(columns):
                store.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",  # noqa: S608
                    [after, len(before) + 1, len(before), before],
                )


def _move(staging: Path, root: Path, names: list[str]) -> None:
    files = staging / "files"
    if (files / ARTIFACTS).is_dir():
        shutil.rmtree(root / ARTIFACTS, ignore_errors=True)  # empty, or moved by a restore that was killed right after
        os.replace(files / ARTIFACTS, root / ARTIFACTS)
    single = [name for name in names if not name.startswith(f"{ARTIFACTS}/")]
    for name in sorted(single, key=lambda name: name == "dvc.lock"):
        if (files / name).is_file():
            os.replace(files / name, root / name)
    shutil.rmtree(staging)


def _notes(root: Path, manifest: dict[str, Any]) -> list[str]:
    notes = []
    commit = commit_of(root)[0]
    other = manifest.get("commit") and commit != manifest["commit"]
    if other:
        notes.append(
            f"the backup was made at commit {manifest['commit'][:12]}, this clone is at {(commit or 'none')[:12]}; with "
            f"other code `dvc repro` may run stages again. For the same code, `git checkout {manifest['commit'][:12]}` in a "
            "fresh clone, then restore there"
        )
    if PATCH in manifest["files"]:
        notes.append(
            f"the checkout had uncommitted changes of its code; they are in {PATCH}: "
            + (f"`git apply {PATCH}` in that clone" if other else f"`git apply {PATCH}`")
        )
    return notes
