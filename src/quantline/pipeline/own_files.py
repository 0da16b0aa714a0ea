"""The files that a configuration names by path, known by their content: a model's folder, and texts.

They are hashed whole, so that no edit goes unseen. The hash of a large file is kept with its size, time and inode, so
that a model of 140 GB is read once and not at every start.

`python -m stages.inputs` writes the hashes to inputs.yaml, where DVC watches what each stage reads, to rerun what reads a
changed file. A file that is not on this machine keeps the hash that is recorded there: results that were made
elsewhere stay valid, and a stage that has to read the file says that it is missing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from quantline.config.data import ModelConfig
from quantline.config.method import BASELINE
from quantline.core.files import replaced, sha256_of
from quantline.core.text import as_configured
from quantline.pipeline.config import Config

INPUTS_FILE = "inputs.yaml"
# Smaller files are hashed at once: 64 MiB take less than 0.1 s.
_KEPT_FROM_BYTES = 64 * 2**20
_CACHE = Path("scratch", ".hashes.json")
# A file that changes within the clock's tick keeps its time, so a hash that was taken right after a change is not kept.
_SETTLED_NS = 2 * 10**9


def located(root: Path, path: str) -> Path:
    """A path in a configuration: `~` is the user's home, a relative path starts at the checkout."""
    return root / Path(path).expanduser()


def text_hash(root: Path, path: str) -> str | None:
    """SHA-256 of a text; the recorded one if it is not on this machine, None if there is none."""
    place = located(root, path)
    if place.is_file():
        return _hash(root, place)
    known = _recorded(root).get(path)
    return known if isinstance(known, str) else None


def model_hashes(root: Path, model: ModelConfig) -> dict[str, str]:
    """SHA-256 of the files of a model in a folder, by name; those that are recorded if it is not on this machine.

    model: with a `path`.
    """
    from quantline.data.download import source_files

    folder = located(root, str(model.path))
    if folder.is_dir():
        return {name: _hash(root, folder / name) for name in sorted(source_files(model, folder))}
    known = _recorded(root).get(str(model.path))
    return dict(known) if isinstance(known, Mapping) else {}


def missing_texts(root: Path, config: Config) -> list[str]:
    """The texts that a variant reads and that are not on this machine, each by the option that names it."""
    named: dict[str, str | None] = {}
    if config.method.name != BASELINE:
        for name, source in config.calibration.sources.items():
            key = "path" if source.path == config.calibration.path else f"sources.{name}.path"
            if source.path or not source.repo:
                named[f"calibration.{key}"] = source.path
    named["evaluate.path"] = config.evaluate.path
    if config.tasks.any:
        named["tasks.path"] = config.tasks.path
    return [
        f"{option}={as_configured(path)}: {fault}; give an existing file"
        for option, path in named.items()
        if (fault := _text_fault(root, path))
    ]


def _text_fault(root: Path, path: str | None) -> str | None:
    if not path:
        return "is not set"
    place = located(root, path)
    if place.is_file():
        return None
    looked = "" if Path(path).expanduser().is_absolute() else f" (looked in {root})"
    return f"{'is not a file' if place.exists() else 'does not exist'}{looked}"


def _recorded(root: Path) -> dict[str, Any]:
    """The hashes in inputs.yaml by path."""
    path = root / INPUTS_FILE
    return _read_recorded(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache
def _read_recorded(path: Path, _mtime_ns: int) -> dict[str, Any]:
    from quantline.pipeline.yaml_file import read_yaml

    content = read_yaml(path, "it is made by `python -m stages.inputs`")
    files = content.get("files") if isinstance(content, dict) else None
    return {name: value for name, value in files.items() if value} if isinstance(files, dict) else {}


def _hash(root: Path, path: Path) -> str:
    stat = path.stat()
    return _hash_of(root, path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _hash_of(root: Path, path: Path, size: int, mtime_ns: int, inode: int) -> str:
    if size < _KEPT_FROM_BYTES:
        return sha256_of(path)
    place, key = root / _CACHE, [size, mtime_ns, inode]
    known = _kept(place)
    entry = known.get(str(path))
    if isinstance(entry, list) and entry[:-1] == key:
        return str(entry[-1])
    found = sha256_of(path)
    if time.time_ns() - mtime_ns > _SETTLED_NS:
        kept = {name: value for name, value in known.items() if os.path.exists(name)}
        with suppress(OSError), replaced(place) as temporary:  # a checkout that is only read keeps none
            temporary.write_text(json.dumps({**kept, str(path): [*key, found]}, indent=0), encoding="utf-8")
    return found


def _kept(place: Path) -> dict[str, Any]:
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
