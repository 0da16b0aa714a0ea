"""Checks every file of the workspace and of DVC's cache against dvc.lock and the results.

A damaged object in the cache goes unnoticed until it is needed, perhaps on another machine. This module reads every object
and reports each fault with its file, variant and remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from quantline.core.errors import UserError
from quantline.lifecycle.storage.dvc_cache import (
    Entry,
    all_objects,
    entries_of,
    md5_of,
    object_path,
    objects_of,
)
from quantline.lifecycle.storage.dvc_lock import REPAIR, Output, held, lacking, read_lock
from quantline.pipeline.dvc_config import dvc_config
from quantline.pipeline.identity import combined, differing, file_hashes
from quantline.pipeline.paths import read_result

# What reading a result raises that is none.
_NO_RESULT = (UserError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Fault:
    """One fault. where: the file. variant: the file's variant. what: the fault. remedy: the command that repairs it."""

    where: str
    variant: str
    what: str
    remedy: str

    def __str__(self) -> str:
        """Two lines for the terminal."""
        return f"{self.where} ({self.variant}): {self.what}\n    remedy: {self.remedy}"


@dataclass(frozen=True)
class VerifyReport:
    """The numbers of checked objects of the cache and files of the workspace, and the faults."""

    objects: int
    files: int
    bytes: int
    faults: tuple[Fault, ...]


def verify(root: Path, cache: Path, promoted: Mapping[str, str] = MappingProxyType({})) -> VerifyReport:
    """Read and hash all files of the workspace and of the cache.

    promoted: what promoted variants need, as `promoted.promoted` gives it.

    Raises:
        UserError: there is no dvc.lock, it is damaged, or a `dvc` command is working.
    """
    with held(root):
        outputs = read_lock(root)
        faults = [
            Fault("dvc.lock", variant, f"does not have {key}, whose result is here", REPAIR)
            for key, variant in lacking(root).items()
        ]
    damaged, size = _damaged_objects(cache)
    pull = "`make pull`, or " if dvc_config(root)["core"].get("remote") else ""
    count = 0
    for output in outputs:
        place = _Place(root, cache, output, damaged, pull)
        count += len(place.here)
        faults += [*place.workspace_faults(), *place.cache_faults()]
    named = {fault.where for fault in faults}
    for output in outputs:
        place = _Place(root, cache, output, damaged, pull)
        faults += [fault for fault in _result_faults(root, output, place.again) if fault.where not in named]
    named = {fault.where for fault in faults}
    needed = {name: demoting for md5, demoting in promoted.items() for name in objects_of(cache, [md5])}
    for md5, path in damaged.items():
        if str(path) in named:
            continue
        what, whose, remedy = f"its content is not {md5}", "no current variant", f"no variant needs it: `rm -f {path}`"
        if md5 in needed:
            whose = "a promoted variant"
            remedy = (
                f"`rm -f {path}`, then `python -m stages.retention`, which gets it from the remote, or `{needed[md5]}`"
            )
        faults.append(Fault(str(path), whose, what, remedy))
    return VerifyReport(sum(1 for _ in all_objects(cache)), count, size, tuple(faults))


def _damaged_objects(cache: Path) -> tuple[dict[str, Path], int]:
    damaged, size = {}, 0
    for md5 in all_objects(cache):
        path = object_path(cache, md5)
        size += path.stat().st_size
        if md5_of(path) != md5.removesuffix(".dir"):
            damaged[md5] = path
    return damaged, size


@dataclass(frozen=True)
class _Place:
    """An output in the workspace and in the cache. pull: the words that advise a pull, empty without a remote."""

    root: Path
    cache: Path
    output: Output
    damaged: Mapping[str, Path]
    pull: str

    @cached_property
    def entries(self) -> list[Entry] | None:
        """Its files by dvc.lock; None if their list is missing or damaged."""
        return entries_of(self.cache, self.output.path, self.output.md5)

    @cached_property
    def here(self) -> dict[str, str]:
        """The files of the workspace -> MD5."""
        place = self.root / self.output.path
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
        return {path.relative_to(self.root).as_posix(): md5_of(path) for path in sorted(files) if path.is_file()}

    @property
    def again(self) -> str:
        """The commands that make it again, where neither place has it whole."""
        item = f"{self.pull}`dvc repro --force --single-item {self.output.stage}`"
        return f"`rm -rf {self.output.path}`, then {item}"

    def _lost(self, md5: str) -> str | None:
        if md5 in self.damaged:
            return "is damaged"
        return None if object_path(self.cache, md5).is_file() else "is missing"

    @property
    def _is_cached(self) -> bool:
        needed = [self.output.md5, *(entry.md5 for entry in self.entries or [])]
        return self.entries is not None and not any(map(self._lost, needed))

    @property
    def _is_here(self) -> bool:
        if self.entries is not None:
            return self.here == {entry.path: entry.md5 for entry in self.entries}
        # If the list of a folder's files is missing, the stage's result still has their hashes.
        folder = self.root / self.output.path
        try:
            return folder.is_dir() and not differing(_recorded(folder)[0], file_hashes(folder))
        except _NO_RESULT:
            return False

    def workspace_faults(self) -> list[Fault]:
        """What differs from dvc.lock. The cache has it, or the output is to be made again."""
        path, name = self.output.path, self.output.variant
        remedy = (
            f"`dvc checkout --force {path}` takes it from the cache" if self._is_cached else "that of its object below"
        )
        if not (self.root / path).exists():
            return [Fault(path, name, "is missing", remedy)]
        wanted, faults = {entry.path: entry.md5 for entry in self.entries or []}, []
        for file in sorted(wanted.keys() | self.here.keys()) if self.entries is not None else ():
            if file not in self.here:
                faults.append(Fault(file, name, "is missing", remedy))
            elif file not in wanted:
                faults.append(Fault(file, name, "is not in dvc.lock", remedy))
            elif self.here[file] != wanted[file]:
                what = f"its content is not {wanted[file]}, which dvc.lock records"
                faults.append(Fault(file, name, what, remedy))
        return faults

    def cache_faults(self) -> list[Fault]:
        """What the cache lost. The workspace has it, or the output is to be made again; the first one says so for all."""
        objects = {self.output.md5: self.output.path, **{entry.md5: entry.path for entry in self.entries or []}}
        lost = {
            object_path(self.cache, md5): (what, name) for md5, name in objects.items() if (what := self._lost(md5))
        }
        # DVC copies the content from the workspace if that is intact.
        then = f"{self.pull}`dvc commit --force {self.output.stage}`" if self._is_here else self.again
        remedies = [f"`rm -f {' '.join(map(str, lost))}`, then {then}", *["the same"] * len(lost)]
        return [
            Fault(str(path), self.output.variant, f"{what}; it is the content of {name}", remedy)
            for (path, (what, name)), remedy in zip(lost.items(), remedies, strict=False)
        ]


def _recorded(folder: Path) -> tuple[dict[str, str], str]:
    """The hashes of an output's files, and of all of them, by the result beside it."""
    result = read_result(folder.with_name(f"{folder.name}.json"))
    return dict(result["outputs"]), result["output_hash"]


def _result_faults(root: Path, output: Output, again: str) -> list[Fault]:
    folder = root / output.path
    result = folder.with_name(folder.name + ".json")
    if not folder.is_dir() or not result.is_file() or not output.path.startswith("artifacts/"):
        return []
    name = result.relative_to(root).as_posix()
    try:
        outputs, whole = _recorded(folder)
    except _NO_RESULT as error:
        return [Fault(name, output.variant, f"is not a valid result: {error}", again)]
    now = file_hashes(folder)
    what = f"does not match the SHA-256 in {name}"
    faults = [Fault(f"{output.path}/{file}", output.variant, what, again) for file in differing(outputs, now)]
    if outputs == now and whole != combined(now):
        faults.append(Fault(name, output.variant, "its output_hash does not match its outputs", again))
    return faults
