"""What may be removed from DVC's cache: all but what the workspace, git's history as asked for, and promoted variants need.

DVC says what is needed (`Repo.used_objs`) and removes the rest (`dvc_data.hashfile.gc`), as `dvc gc` does. The command
itself names what it would remove only in printed text, and has no option to protect an object.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import QuantlineError, UserError
from quantline.lifecycle.storage import dvc_cache
from quantline.pipeline.paths import checked_name

# Arguments of DVC's `used_objs`, which always includes the workspace.
KEEP: dict[str, dict[str, bool]] = {
    "workspace": {}, "branches": {"all_branches": True}, "tags": {"all_branches": True, "all_tags": True},
    "commits": {"all_commits": True},
}  # fmt: skip
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclass(frozen=True)
class Garbage:
    """What would go, or went. objects: names. bytes: of the local ones. protected: objects that stayed for a promotion."""

    objects: tuple[str, ...]
    bytes: int
    protected: int


def promoted(root: Path) -> frozenset[str]:
    """MD5s of the DVC objects that promoted variants need; none where nothing can be promoted."""
    from quantline.lifecycle.tracking.registry import promoted_outputs

    return frozenset(md5 for _, _, hashes in promoted_outputs(root) for md5 in hashes)


def former_outputs(root: Path) -> list[Path]:
    """What lies here of variants that params.yaml has no more: their folder in artifacts/, their frozen configuration.

    `report` depends on both folders, so a clone that lacks them would make it again.

    Raises:
        UserError: dvc.lock is missing or malformed, or names what cannot be a variant.
    """
    names = [checked_name(name) for name in dvc_cache.former_variants(root)]
    places = [place for name in names for place in (root / "artifacts" / name, root / "variants" / f"{name}.yaml")]
    return [place for place in places if place.exists()]


def remove_former(places: Sequence[Path]) -> None:
    """Remove what `former_outputs` names; a link goes, not what it leads to."""
    for place in places:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def collect_garbage(
    root: Path, protected: Collection[str], *, keep: str = "workspace", remote: str | None = None, apply: bool = False
) -> Garbage:
    """Remove from the cache what neither `keep` nor `protected` needs; without `apply`, only say what that is.

    protected: MD5s as in dvc.lock, a folder's with `.dir`. keep: what of git's history is kept beside the workspace.
    remote: a DVC remote to be cleaned along with the cache; its objects are counted, their bytes are not known.

    Raises:
        UserError: `keep` is none of these, an MD5 is none, or the list of a protected folder is not in the cache, so that
            its files are not known; nothing is removed.
        QuantlineError: DVC failed, with its own message.
    """
    if keep not in KEEP:
        raise UserError(f"keep={keep}: give {', '.join(KEEP)}")
    strange = sorted(md5 for md5 in protected if not _MD5.fullmatch(md5))
    if strange:
        raise UserError(f"{strange[0]}: is no MD5 of DVC's; nothing was removed")
    cache = dvc_cache.cache_folder(root)
    for md5 in sorted(protected):
        if md5.endswith(dvc_cache.DIR) and dvc_cache.entries_of(cache, "", md5) is None:
            raise UserError(
                f"{dvc_cache.object_path(cache, md5)}: is missing or damaged, and a promoted variant needs it; get it with "
                "`make pull`, or demote the variant. Nothing was removed"
            )
    guarded = dvc_cache.objects_of(cache, protected)
    with dvc_cache.opened(root) as repo, _explained(), repo.lock:
        used = _used(repo, KEEP[keep], guarded, remote)
        stores = [repo.cache.local, *([repo.cloud.get_remote_odb(remote, "gc")] if remote else [])]
        local, *others = ({md5 for md5 in store.all() if md5 not in used} for store in stores)
        paths = [dvc_cache.object_path(cache, md5) for md5 in local]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        objects = tuple(sorted(local.union(*others)))
        if apply and objects:
            for store in stores:
                _remove(store, used, remote=store is not repo.cache.local)
    return Garbage(objects, size, len(guarded))


def _used(repo: Any, history: Mapping[str, bool], guarded: Collection[str], remote: str | None) -> set[str]:
    """MD5s of all objects that are needed, those inside folders among them."""
    found = repo.used_objs(**history, remote=remote, force=True)
    return {str(info.value) for infos in found.values() for info in infos if info.name == "md5"}.union(guarded)


def _remove(store: Any, used: Collection[str], *, remote: bool) -> None:
    from dvc_data.hashfile.db import get_index
    from dvc_data.hashfile.gc import gc
    from dvc_data.hashfile.hash_info import HashInfo

    gc(store, [HashInfo("md5", md5) for md5 in used])
    if remote:
        get_index(store).clear()  # what DVC remembers of it


@contextmanager
def _explained() -> Iterator[None]:
    try:
        with redirect_stderr(io.StringIO()):  # DVC's progress bars
            yield
    except QuantlineError:
        raise
    except Exception as error:  # the border: a remote's file system can raise anything, and not all is DVC's own
        raise QuantlineError(
            f"DVC could not tell or remove what is not needed: {error or type(error).__name__}"
        ) from error
