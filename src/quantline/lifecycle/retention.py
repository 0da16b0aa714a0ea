"""`dvc gc`, told what must stay: what the workspace and promoted variants need.

DVC keeps what other projects of a shared cache need, so the protected objects are given to it as such a project: a folder
with one `.dvc` file an object.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantline.core.errors import QuantlineError, UserError
from quantline.lifecycle.storage import dvc_cache
from quantline.pipeline.paths import checked_name

KEEP = {"workspace": ["-w"], "branches": ["-a"], "tags": ["-a", "-T"], "commits": ["-A"]}
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
        UserError: `keep` is none of these, an MD5 is none, or a protected object is not in the cache, whose content is then
            not known to `dvc gc`; nothing is removed.
        QuantlineError: `dvc gc` failed.
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
    with _as_project(protected, cache) as project:
        options = [*KEEP[keep], *(["-c", "-r", remote] if remote else []), "-f", "-p", str(project)]
        said = _gc(root, [*options, "--dry"])
        objects = tuple(sorted({_name_of(path) for path in re.findall(r"Removing (\S+)", said)}))
        # Not what dvc says but what may be: a protected object among the garbage would be a fault, found before the act.
        guarded = dvc_cache.objects_of(cache, protected)
        lost = guarded.intersection(objects)
        if lost:
            raise QuantlineError(f"dvc gc would remove {sorted(lost)[0]}, which is protected; nothing was removed")
        local = [dvc_cache.object_path(cache, name) for name in objects]
        size = sum(path.stat().st_size for path in local if path.is_file())
        if apply and objects:
            _gc(root, options)
    return Garbage(objects, size, len(guarded))


def _name_of(path: str) -> str:
    folder, name = Path(path).parts[-2:]
    return folder + name


def _gc(root: Path, options: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "gc", *options], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise QuantlineError(f"dvc gc failed: {(done.stderr or done.stdout).strip()}")
    return f"{done.stdout}\n{done.stderr}"


@contextmanager
def _as_project(protected: Collection[str], cache: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="quantline-protected-") as scratch:
        project = Path(scratch)
        (project / ".dvc").mkdir()
        config = f"[core]\n    no_scm = True\n    analytics = false\n[cache]\n    dir = {cache}\n"
        (project / ".dvc" / "config").write_text(config, encoding="utf-8")
        for number, md5 in enumerate(sorted(protected)):
            out = f"outs:\n- md5: {md5}\n  hash: md5\n  path: object-{number}\n"
            (project / f"object-{number}.dvc").write_text(out, encoding="utf-8")
        yield project
