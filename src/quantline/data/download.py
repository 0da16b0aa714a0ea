"""Fetches the float model, from a pinned commit on a hub or from a folder, into one folder of checked plain files."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.finite import nonfinite
from quantline.checkpoints.linears import why_not_float
from quantline.checkpoints.model_config import number_fault, why_not_causal
from quantline.checkpoints.model_files import (
    CODE,
    COMPANIONS,
    FOLDERS,
    INDEX_NAME,
    PICKLED_INDEX,
    PICKLED_NAME,
    WEIGHTS_NAME,
    beside,
    files_of,
    matching,
    no_weights,
    tokenizer_fault,
    weights_of,
)  # fmt: skip
from quantline.config.data import ModelConfig
from quantline.core.errors import UserError, naming
from quantline.core.files import building, copy_file, sha256_of, write_json
from quantline.core.progress import bar
from quantline.data import hub
from quantline.data.tokenizer import check_tokenizer

_REMEDY = "or give a folder with model.path=DIR"
_PICKLES = "use a repository or a commit with safetensors, or set model.allow_pickle=true to load and convert them"


def model_name(source: ModelConfig) -> str:
    """A name for a model: the last part of the repository or path that is not `model`, which is too common."""
    parts = [part for part in (source.repo or source.path or "").replace("\\", "/").split("/") if part not in ("", ".")]
    named = [part for part in parts if part not in ("..", "model")] or parts
    return re.sub(r"[^A-Za-z0-9._-]+", "-", named[-1]).strip("-.") if named else "model"


def spoken_name(model: Mapping[str, Any]) -> str:
    """A model's name for readers, from its options: the given name, `owner/name`, or the end of the path."""
    source = ModelConfig.model_construct(repo=None, path=model.get("path"))
    return str(model.get("name") or model.get("repo") or model_name(source))


def label_of(source: ModelConfig) -> str:
    """A model in messages, as it was given: `owner/name@commit`, or the folder."""
    return f"{source.repo}@{source.revision}" if source.repo else str(source.path)


def fetch(source: ModelConfig, out: Path) -> dict[str, Any]:
    """Copy a model to `out` and check it. `out` appears complete or not at all, and contains plain files, no links.

    Only safetensors weights, configuration, tokenizer, chat template and licence are copied.

    Returns:
        `repo`, `revision` (both None for a folder), `weights` ("safetensors" or "pickle"), `architecture`,
        `model_type`, `files` (name -> `sha256` in hexadecimal and `bytes`), `bytes` (their sum), `sha256` (one hash
        over the files' names and hashes) and `seconds`.

    Raises:
        UserError: the source is not available, or is not a complete, safe model.
    """
    started = time.perf_counter()
    if (source.repo is None) == (source.path is None):
        given = "both model.repo and model.path are set" if source.repo else "neither model.repo nor model.path is set"
        raise UserError(f"{given}: give model.path=DIR, or model.repo=OWNER/NAME and model.revision=COMMIT")
    label = label_of(source)
    with building(out) as folder, naming(folder, label, ": "):
        if source.path is not None:
            hashes = _from_folder(source, Path(source.path), folder, out)
        else:
            hashes = _from_hub(source, str(source.repo), folder)
        config, weights = _checked(source, folder, label)
    sizes = {name: (out / name).stat().st_size for name in sorted(hashes)}
    whole = hashlib.sha256("".join(f"{hashes[name]} {name}\n" for name in sizes).encode())
    return {
        "repo": source.repo,
        "revision": source.revision if source.repo else None,
        "weights": weights,
        "architecture": next(iter(config.get("architectures") or []), None),
        "model_type": config.get("model_type"),
        "files": {name: {"sha256": hashes[name], "bytes": size} for name, size in sizes.items()},
        "bytes": sum(sizes.values()),
        "sha256": whole.hexdigest(),
        "seconds": time.perf_counter() - started,
    }


def check_contents(folder: Path) -> None:
    """Check what a model's files say: its tokenizer tokenizes, its weights are numbers.

    Raises:
        UserError: the tokenizer cannot be used, or weights are infinite or NaN.
    """
    check_tokenizer(folder)
    if found := nonfinite(folder):
        name, count = next(iter(found.items()))
        more = f", and {len(found) - 1} tensors more" if len(found) > 1 else ""
        raise UserError(
            f"{folder}: {name} has {count} values that are NaN or infinite{more}: the weights are damaged, on every device; "
            "fetch or save them again, or take another model.revision"
        )


def _patterns(source: ModelConfig) -> list[str]:
    return ["config.json", *COMPANIONS, *(CODE if source.trust_remote_code else ())]


def source_files(source: ModelConfig, folder: Path) -> list[str]:
    """The files of a model's folder that `fetch` copies; pickled weights where they are allowed and there are no others.

    Raises:
        CheckpointError: the index of the weights is damaged.
    """
    weights = _weights(folder, pickled=False)
    if not weights and source.allow_pickle:
        weights = _weights(folder, pickled=True)
    return [*matching(folder, _patterns(source)), *weights]


def _from_hub(source: ModelConfig, repo: str, folder: Path) -> dict[str, str]:
    origin = hub.HubRepo(repo, source.revision, "model", "model", _REMEDY)
    patterns = _patterns(source)
    # A pattern's * matches a slash, too, so each depth is asked for by itself.
    cached = hub.fetch_snapshot(origin, [*patterns, INDEX_NAME], ["*/*"])
    there = hub.list_files(origin)
    if there is None or any(name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) for name in there):
        hub.fetch_snapshot(origin, [f"{name}/*" for name in FOLDERS], ["*/*/*"])
    weights = _hub_weights(origin, cached, pickled=False)
    if not weights and source.allow_pickle:
        if there is None or PICKLED_INDEX in there:
            hub.fetch_snapshot(origin, [PICKLED_INDEX], ["*/*"])
        weights = _hub_weights(origin, cached, pickled=True)
    if not weights:
        names = files_of(cached) if there is None else there
        read = partial(hub.fetch_file, origin)
        raise UserError(no_weights(f"{repo}@{source.revision}", names, read=read, pickles=_PICKLES))
    names = [*matching(cached, patterns), *weights]
    return _transfer(cached, names, folder, lambda path: hub.hash_checked(path, f"{repo}: {path.name}"), link=True)


def _hub_weights(origin: hub.HubRepo, cached: Path, *, pickled: bool) -> list[str]:
    """Fetch the files of the weights that the index names, or the single file; those that are there."""
    single, index = (PICKLED_NAME, PICKLED_INDEX) if pickled else (WEIGHTS_NAME, INDEX_NAME)
    wanted = weights_of([index], cached.joinpath, pickled=pickled) if (cached / index).is_file() else [single]
    hub.fetch_snapshot(origin, [glob.escape(name) for name in wanted], [])
    return _weights(cached, pickled=pickled)


def _weights(folder: Path, *, pickled: bool) -> list[str]:
    found = weights_of(files_of(folder), folder.joinpath, pickled=pickled)
    return [name for name in found if (folder / name).is_file()]


def _from_folder(source: ModelConfig, given: Path, folder: Path, out: Path) -> dict[str, str]:
    path = given.expanduser().resolve()
    if not path.is_dir():
        fact = "is a file" if path.exists() else "does not exist"
        raise UserError(f"model.path={given}: {path} {fact}; give the folder that holds config.json")
    if path == out.resolve():
        raise UserError(f"model.path={given}: this is the folder to copy the model to; give another one")
    files = source_files(source, path)
    weights = weights_of(files, path.joinpath) or weights_of(files, path.joinpath, pickled=True)
    if not weights:
        raise UserError(no_weights(str(given), files_of(path), read=path.joinpath, pickles=_PICKLES))
    return _transfer(path, files, folder, sha256_of, link=False)


def _transfer(
    origin: Path, names: Sequence[str], folder: Path, hash_of: Callable[[Path], str], *, link: bool
) -> dict[str, str]:
    """Put files into `folder` as plain files, all weights beside their index; returns their hashes by name.

    With `link`, weights are hard links into the cache where possible.
    """
    total = sum((origin / name).stat().st_size for name in names)
    hashes: dict[str, str] = {}
    done = 0
    moved: dict[str, str] = {}
    anew: dict[str, dict[str, Any]] = {}
    for name in {INDEX_NAME, PICKLED_INDEX}.intersection(names):
        own, content = beside(origin / name)
        moved |= own
        anew |= {name: content} if own else {}
    with bar("checking files") as progress:
        for name in sorted(names):
            path, target = origin / name, folder / moved.get(name, name)
            progress.update(done, total, name)
            hashes[target.relative_to(folder).as_posix()] = hash_of(path)
            done += path.stat().st_size
            target.parent.mkdir(exist_ok=True)
            if name in anew:
                write_json(target, anew[name])
                hashes[name] = sha256_of(target)
                continue
            if link and path.suffix == ".safetensors":
                try:
                    os.link(path.resolve(), target)
                    continue
                except OSError:
                    pass  # another file system, or one without hard links
            copy_file(path, target)
        progress.update(total, total)
    return hashes


def _checked(source: ModelConfig, folder: Path, label: str) -> tuple[dict[str, Any], str]:
    config = _config(folder, label)
    if config.get("auto_map") and not source.trust_remote_code:
        code = ", ".join(sorted({str(value) for value in config["auto_map"].values()}))
        raise UserError(
            f"{label}: config.json needs Python code from the repository (auto_map: {code}); read that code and set "
            "model.trust_remote_code=true, or use a model that transformers supports without it"
        )
    _check_companions(folder, sorted(path.name for path in folder.glob("*.json")), label, source)
    if not _weights(folder, pickled=False):
        return config, "pickle"
    if fault := why_not_float(Checkpoint.open(folder)):
        raise UserError(f"{label}: {fault}")
    return config, "safetensors"


def _check_companions(folder: Path, names: Sequence[str], label: str, source: ModelConfig) -> None:
    if fault := tokenizer_fault(folder, label if source.path else "DIR"):
        raise UserError(f"{label}: {fault}")
    for name in names:
        if name.endswith(".json"):
            _json(folder / name, f"{label}: {name}")


def check_beside_weights(source: ModelConfig, folder: Path) -> None:
    """Refuse a model in a folder for what lies beside its weights, in the words of its download: nothing is copied.

    Raises:
        UserError: a file is not valid JSON, or the tokenizer cannot be used.
    """
    label = label_of(source)
    _check_companions(folder, matching(folder, _patterns(source)), label, source)
    with naming(folder, label, ": "):
        check_tokenizer(folder)


def _config(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{label}: has no config.json; give a complete model as transformers saves it")
    config = _json(path, f"{label}: config.json")
    if not isinstance(config, dict):
        raise UserError(f"{label}: config.json is no JSON object; give a complete model as transformers saves it")
    if reason := why_not_causal(config):
        raise UserError(f"{label}: {reason}; give a model that predicts the next token")
    if fault := number_fault(config):
        raise UserError(f"{label}: {fault}")
    if not isinstance(config.get("auto_map") or {}, dict):
        raise UserError(f"{label}: auto_map in config.json is not a mapping; fetch it again")
    return config


def _json(path: Path, label: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        size = path.stat().st_size
        raise UserError(
            f"{label} is not valid JSON ({error}; {size} bytes): it is truncated or damaged; fetch it again"
        ) from None
