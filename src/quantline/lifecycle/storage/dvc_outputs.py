"""A variant's outputs in DVC: its part of dvc.lock, and fetching outputs from the cache or a remote by hash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantline.lifecycle.storage.dvc_cache import md5_of, opened, quiet, require_remote
from quantline.lifecycle.storage.dvc_lock import locked_outs, stage_keys
from quantline.pipeline.records import VariantRecord


def variant_lock(root: Path, name: str) -> dict[str, Any]:
    """A variant's outputs in dvc.lock whose results match the files here; {} if the pipeline has not run.

    Returns:
        stage of dvc.yaml -> {"outs": [{"path", "md5", "size", ...}]}, including the shared download.
    """
    if not (root / "dvc.lock").is_file():
        return {}
    locked = locked_outs(root)
    kept = {}
    for key in stage_keys(name).values():
        outs = locked.get(key, [])
        results = [out for out in outs if str(out["path"]).endswith(".json")]
        # A result that was since remade without DVC belongs to other outputs than those in the lock.
        if results and all(_is_in_lock(root, out) for out in results):
            kept[key] = {"outs": outs}
    return kept


def with_locks(records: Iterable[VariantRecord]) -> list[VariantRecord]:
    """The records; those of the pipeline with their part of dvc.lock.

    Raises:
        UserError: dvc.lock is malformed, or a `dvc` command is working.
    """
    return [
        replace(record, lock=variant_lock(record.folder, record.name)) if record.config.get("frozen") else record
        for record in records
    ]


def unlocked_stages(record: VariantRecord) -> dict[str, str]:
    """The stages of a variant of the pipeline that its part of dvc.lock does not have -> their names in dvc.lock."""
    if not record.config.get("frozen"):
        return {}
    return {stage: key for stage, key in stage_keys(record.name).items() if key not in record.lock}


def _is_in_lock(root: Path, out: Mapping[str, Any]) -> bool:
    path = root / str(out["path"])
    return path.is_file() and md5_of(path) == out["md5"]


def outputs_of(lock: Mapping[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """The outs of a stage in a variant's lock, by the last part of their path: `convert`, `convert.json`."""
    for key, entry in lock.items():
        if key.removesuffix("_baseline").partition("@")[0] == stage:
            return {str(out["path"]).rpartition("/")[2]: out for out in entry["outs"]}
    return {}


def hashes_of(lock: Mapping[str, Any]) -> frozenset[str]:
    """Every DVC hash in a variant's lock; a folder's hash ends with `.dir`."""
    return frozenset(str(out["md5"]) for entry in lock.values() for out in entry["outs"] if "md5" in out)


def fetch_outputs(root: Path, outs: Mapping[Path, Mapping[str, Any]], remote: str | None = None) -> list[str]:
    """Copy outputs from this checkout's DVC cache to new paths; missing objects are pulled from a remote first.

    Args:
        root: the checkout, whose DVC configuration defines the cache and the remotes.
        outs: new path -> its entry in dvc.lock; the path must not exist, but its parent folder must.
        remote: name of the remote; null is DVC's default.

    Returns:
        reasons why outputs are not available, one line each; nothing was written then.

    Raises:
        UserError: the checkout is not a DVC repository, or has no remote of that name.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    with opened(root) as repo:
        wanted = {path: HashInfo("md5", str(out["md5"])) for path, out in outs.items()}
        faults = bring(repo, [str(info.value) for info in wanted.values()], remote)
        missing = [f"{path.name} ({info.value})" for path, info in wanted.items() if _absent(repo, [info])]
        if missing:
            places = "the cache does not have" if faults else "neither the cache nor a remote has"
            return [*faults, f"{places} {', '.join(missing)}"]
        for path, info in wanted.items():
            _write(repo, path, info)
    return []


def bring(repo: Any, md5s: Iterable[str], remote: str | None = None) -> list[str]:
    """Fetch the objects that the cache lacks from a remote, folders with their files.

    Args:
        repo: DVC's, as `opened` gives it.
        md5s: of the objects, a folder's with `.dir`.
        remote: name of the remote; null is DVC's default, if it has one.

    Returns:
        why the remote could not be read, one line each; empty also where it does not have the objects.

    Raises:
        UserError: there is no remote of that name.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    name = remote or repo.config["core"].get("remote")
    if name:
        require_remote(repo.config, name)
    wanted = [HashInfo("md5", md5) for md5 in md5s]
    try:
        for _ in range(2):  # a folder's list of files first, then the files
            absent = _absent(repo, wanted)
            if name and absent:
                with quiet():
                    repo.cloud.pull(absent, remote=name)
    except Exception as error:  # a remote's file system can raise any exception, not only DVC's
        return [f"the remote {name} could not be read ({type(error).__name__}; `dvc remote list` says where it is)"]
    return []


def _absent(repo: Any, wanted: list[Any]) -> list[Any]:
    return [inner for info in wanted for inner in _objects(repo, info) if not repo.cache.local.exists(inner.value)]


def _objects(repo: Any, info: Any) -> Iterator[Any]:
    from dvc_data.hashfile.tree import Tree

    yield info
    if info.isdir and repo.cache.local.exists(info.value):
        for _, _, inner in Tree.load(repo.cache.local, info):
            yield inner


def _write(repo: Any, path: Path, info: Any) -> None:
    """Copy an output from the cache; never as a link, so that edits cannot change the cache."""
    from dvc_data.hashfile.tree import Tree

    cache = repo.cache.local
    files = {path: info.value}
    if info.isdir:
        path.mkdir()
        files = {path.joinpath(*key): inner.value for key, _, inner in Tree.load(cache, info)}
    for target, value in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(cache.oid_to_path(value), "rb") as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
