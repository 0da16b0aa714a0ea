"""Removes objects from DVC's cache that the workspace, the chosen git history and promoted variants do not need.

DVC lists the needed objects (`Repo.used_objs`) and removes the rest (`dvc_data.hashfile.gc`), as `dvc gc` does. That
command itself lists what it would remove only as printed text, and has no option to protect an object.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import QuantlineError, UserError
from quantline.core.files import clear, foreign
from quantline.lifecycle.promoted import require_whole
from quantline.lifecycle.storage import dvc_cache, dvc_lock
from quantline.pipeline.dvc_config import cache_folder
from quantline.pipeline.paths import frozen_path, is_folder_name

# Arguments for DVC's `used_objs`, which always includes the workspace.
KEEP: dict[str, dict[str, bool]] = {
    "workspace": {}, "branches": {"all_branches": True}, "tags": {"all_branches": True, "all_tags": True},
    "commits": {"all_commits": True},
}  # fmt: skip


@dataclass(frozen=True)
class Garbage:
    """Removable or removed objects. bytes: size of the local ones. protected: number kept for promoted variants.

    described: what each object is, for a reader.
    """

    objects: tuple[str, ...]
    bytes: int
    protected: int
    described: Mapping[str, str]


def former_outputs(root: Path) -> list[Path]:
    """Leftovers of variants and models that were removed from params.yaml: what they have in artifacts/, their frozen
    configurations, a removed model's report.

    `report` depends on these folders, so a clone without them would run it again.

    Raises:
        UserError: dvc.lock is missing or malformed, or has an invalid name of a variant.
    """
    places: dict[Path, None] = {}
    for output in dvc_lock.former_outputs(root):
        home, *parts = Path(output.path).parts
        if not parts:  # what one model has beside the folders, such as metrics.json
            continue
        if not all(is_folder_name(part) for part in (*parts[:-1], Path(parts[-1]).stem)):
            raise UserError(f"dvc.lock: {output.path} is of no variant; take dvc.lock from git, or remove it")
        if home == "artifacts":
            places |= dict.fromkeys((root / home / output.variant, frozen_path(root, output.variant)))
        else:  # a frozen configuration, a model's report, its metrics
            places[root / output.path] = None
    return [place for place in places if place.exists()]


def remove_former(places: Sequence[Path]) -> None:
    """Remove the result of `former_outputs`; a link is removed, but not its target."""
    for place in places:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        with suppress(OSError):  # the folder of a model that has nothing else
            place.parent.rmdir()


def remove_partial(root: Path) -> list[str]:
    """Remove half-made outputs of processes that were killed on this machine; returns a line for each, for the user."""
    below = {place.parent for home in ("artifacts", "scratch") for place in (root / home).rglob(".*.partial-*")}
    folders = [root, root / "variants", *sorted((root / "variants").glob("*/")), *sorted(below)]
    removed, others = (
        [place.relative_to(root) for folder in folders for place in of(folder)] for of in (clear, foreign)
    )
    return [f"removed {place}: half made by a process that was killed" for place in removed] + [
        f"{place}: half made on another machine, or by an older version; if no process there makes it any more, remove it"
        for place in others
    ]


def collect_garbage(
    root: Path, protected: Mapping[str, str], *, keep: str = "workspace", remote: str | None = None, apply: bool = False
) -> Garbage:
    """Remove objects that neither `keep` nor `protected` needs from the cache; without `apply`, only list them.

    protected: what promoted variants need, as `promoted` gives it; what the cache lacks of it is brought from a remote.
    keep: the part of git's history to keep besides the workspace.
    remote: a DVC remote to clean as well; its objects are counted, but their sizes are not known.

    Raises:
        UserError: `keep` is not valid, an MD5 is not valid, a `dvc` command is working, dvc.lock lacks a stage whose result
            is here, an object of a promoted variant is missing, or the list of a folder's files is, so that they are not
            known; nothing is removed.
        QuantlineError: DVC failed, with its own message.
    """
    if keep not in KEEP:
        raise UserError(f"keep={keep}: allowed are {', '.join(KEEP)}")
    strange = sorted(md5 for md5 in protected if not dvc_lock.MD5.fullmatch(md5))
    if strange:
        raise UserError(f"{strange[0]}: is not a DVC MD5; nothing was removed")
    cache = cache_folder(root)
    with dvc_lock.held(root), dvc_cache.opened(root) as repo, _explained():
        dvc_lock.refuse_running(root)
        _require_known(root, cache)
        guarded = require_whole(repo, cache, protected, remote)
        used = _used(repo, KEEP[keep], guarded, remote)
        stores = [repo.cache.local, *([repo.cloud.get_remote_odb(remote, "gc")] if remote else [])]
        local, *others = ({md5 for md5 in store.all() if md5 not in used} for store in stores)
        paths = [dvc_cache.object_path(cache, md5) for md5 in local]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        objects = tuple(sorted(local.union(*others)))
        described = dvc_cache.described(cache, objects)
        if apply and objects:
            for store in stores:
                _remove(store, used, remote=store is not repo.cache.local)
    return Garbage(objects, size, len(guarded), described)


def _require_known(root: Path, cache: Path) -> None:
    """Check that all that the workspace needs is known."""
    dvc_lock.require_whole(root)
    for output in dvc_lock.read_lock(root):
        unknown = dvc_cache.entries_of(cache, output.path, output.md5) is None
        if unknown and (root / output.path).exists():  # in a clone that pulled a part, the rest is in neither place
            raise UserError(
                f"{dvc_cache.object_path(cache, output.md5)}: is missing or damaged; it lists the files of {output.path}. "
                "See `python -m stages.verify` for the remedy. Nothing was removed"
            )


def _used(repo: Any, history: Mapping[str, bool], guarded: Collection[str], remote: str | None) -> set[str]:
    """MD5s of all needed objects, including those inside folders."""
    found = repo.used_objs(**history, remote=remote, force=True)
    return {str(info.value) for infos in found.values() for info in infos if info.name == "md5"}.union(guarded)


def _remove(store: Any, used: Collection[str], *, remote: bool) -> None:
    from dvc_data.hashfile.db import get_index
    from dvc_data.hashfile.gc import gc
    from dvc_data.hashfile.hash_info import HashInfo

    gc(store, [HashInfo("md5", md5) for md5 in used])
    if remote:
        get_index(store).clear()  # DVC's index of the remote


@contextmanager
def _explained() -> Iterator[None]:
    try:
        with dvc_cache.quiet():
            yield
    except QuantlineError:
        raise
    except Exception as error:  # a remote's file system can raise any exception, not only DVC's
        raise QuantlineError(
            f"DVC could not find or remove the objects that are not needed: {error or type(error).__name__}"
        ) from error
