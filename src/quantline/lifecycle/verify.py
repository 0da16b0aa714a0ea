"""Checks every file of the workspace and of DVC's cache against dvc.lock and the results.

A damaged object in the cache goes unnoticed until it is needed, perhaps on another machine. This module reads every object
and reports each fault with its file, variant and remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.lifecycle.storage.dvc_cache import Entry, all_objects, entries_of, md5_of, object_path
from quantline.lifecycle.storage.dvc_lock import REPAIR, Output, held, lacking, read_lock
from quantline.pipeline.identity import combined, differing, file_hashes
from quantline.pipeline.paths import SHARED, read_result


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


def verify(root: Path, cache: Path) -> VerifyReport:
    """Read and hash all files of the workspace and of the cache.

    Raises:
        UserError: there is no dvc.lock, it is damaged, or a `dvc` command is working.
    """
    with held(root):
        outputs = read_lock(root)
        faults = [
            Fault("dvc.lock", _variant_of(key), f"does not have {key}, whose result is here", REPAIR)
            for key in lacking(root)
        ]
    damaged, size = _damaged_objects(cache)
    count = 0
    for output in outputs:
        entries = entries_of(cache, output.path, output.md5)
        # If the list of a folder's files is missing, the stage's result still has their hashes.
        count += _check_workspace(root, output, entries, faults)
        _check_cache(root, cache, output, damaged, faults)
    for output in outputs:
        _check_result(root, output, faults)
    named = {fault.where for fault in faults}
    for md5, path in damaged.items():
        if str(path) not in named:
            faults.append(
                Fault(str(path), "no current variant", f"its content is not {md5}", f"no variant needs it: rm {path}")
            )
    return VerifyReport(sum(1 for _ in all_objects(cache)), count, size, tuple(faults))


def _variant_of(key: str) -> str:
    """The variant of a stage, from its name in dvc.lock."""
    return key.partition("@")[2] or (BASELINE if key.endswith("_baseline") else SHARED)


def _damaged_objects(cache: Path) -> tuple[dict[str, Path], int]:
    damaged, size = {}, 0
    for md5 in all_objects(cache):
        path = object_path(cache, md5)
        size += path.stat().st_size
        if md5_of(path) != md5.removesuffix(".dir"):
            damaged[md5] = path
    return damaged, size


def _again(output: Output) -> str:
    return f"`rm -r {output.path}`, then `make pull`, or `dvc repro --force --single-item {output.stage}`"


def _check_workspace(root: Path, output: Output, entries: Sequence[Entry] | None, faults: list[Fault]) -> int:
    place = root / output.path
    if not place.exists():
        faults.append(
            Fault(
                output.path,
                output.variant,
                "is missing",
                f"`dvc checkout {output.path}`, or `dvc repro {output.stage}`",
            )
        )
        return 0
    if entries is None:
        return 0
    wanted = {entry.path: entry.md5 for entry in entries}
    there = (
        {path.relative_to(root).as_posix(): path for path in place.rglob("*") if path.is_file()}
        if place.is_dir()
        else {output.path: place}
    )
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            fault = "is missing"
        elif name not in wanted:
            fault = "is not in dvc.lock"
        elif md5_of(there[name]) != wanted[name]:
            fault = f"its content is not {wanted[name]}, which dvc.lock records"
        else:
            continue
        faults.append(
            Fault(name, output.variant, fault, f"`dvc checkout --force {output.path}` takes it from the cache")
        )
    return len(there)


def _check_cache(root: Path, cache: Path, output: Output, damaged: dict[str, Path], faults: list[Fault]) -> None:
    path = object_path(cache, output.md5)
    if output.md5 in damaged or not path.is_file():
        what = "is damaged" if output.md5 in damaged else "is missing"
        remedy = f"`rm -f {path}`, then `dvc commit --force {output.stage}`, or `make pull`"
        faults.append(Fault(str(path), output.variant, f"{what}; it is the content of {output.path}", remedy))
        return
    for entry in entries_of(cache, output.path, output.md5) or []:
        inner, own = object_path(cache, entry.md5), root / entry.path
        if entry.md5 in damaged or not inner.is_file():
            what = "is damaged" if entry.md5 in damaged else "is missing"
            # DVC copies the content from the workspace if that is intact.
            whole = own.is_file() and md5_of(own) == entry.md5
            remedy = f"`dvc commit --force {output.stage}`, or `make pull`" if whole else _again(output)
            faults.append(
                Fault(
                    str(inner),
                    output.variant,
                    f"{what}; it is the content of {entry.path}",
                    f"`rm -f {inner}`, then {remedy}",
                )
            )


def _check_result(root: Path, output: Output, faults: list[Fault]) -> None:
    folder = root / output.path
    result = folder.with_name(folder.name + ".json")
    if not folder.is_dir() or not result.is_file() or not output.path.startswith("artifacts/"):
        return
    name = result.relative_to(root).as_posix()
    try:
        recorded = read_result(result)
        outputs, whole = dict(recorded["outputs"]), recorded["output_hash"]
    except (UserError, KeyError, TypeError, ValueError) as error:
        faults.append(Fault(name, output.variant, f"is not a valid result: {error}", f"`dvc checkout --force {name}`"))
        return
    now = file_hashes(folder)
    what = f"does not match the SHA-256 in {name}"
    faults += [Fault(f"{output.path}/{file}", output.variant, what, _again(output)) for file in differing(outputs, now)]
    if outputs == now and whole != combined(now):
        faults.append(Fault(name, output.variant, "its output_hash does not match its outputs", _again(output)))
