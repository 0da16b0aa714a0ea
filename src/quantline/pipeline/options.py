"""The options that each stage reads from a configuration, as plain values: the options in its identity.

There is one function per stage, with the stage's name; the table in `quantline.pipeline.stages` refers to them. Keep the
structure of these values, because their hash identifies results: where possible, a new option at its default should not
change the hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantline.core.files import sha256_of
from quantline.pipeline.config import Config


@dataclass(frozen=True)
class Context:
    """Inputs besides the configuration: the checkout, the hashes of the locks, the backends that may quantize it."""

    root: Path
    locks: Mapping[str, str]
    backends: list[str]


def download(config: Config, context: Context) -> dict[str, Any]:
    """The float model, and its files if it is a local folder."""
    content = _folder_content(located(context.root, config.model.path)) if config.model.path else None
    model = config.model.model_dump(exclude={"name"})
    return {"model": model, "content": content, "reference": context.locks["reference"]}


def calibrate(config: Config, context: Context) -> dict[str, Any]:
    """The calibration options, and the hashes of local text files."""
    return {"calibration": config.calibration.model_dump(), "files": _file_hashes(config, context.root)}


def quantize(config: Config, context: Context) -> dict[str, Any]:
    """The method and all options that determine the weights."""
    own = {"method": config.method.model_dump(), "bits": config.bits, "group_size": config.group_size}
    own.update(backends=context.backends, seed=config.seed, threads=config.threads, dtype=config.dtype)
    own.update(coverage=config.layer_errors.model_dump())  # the old name, so that existing results stay valid
    own.update(layers=config.layers.model_dump(), lm_head=config.lm_head, low_memory=config.low_memory)
    return {**own, "environment": context.locks["quantizer"]}


def convert(config: Config, context: Context) -> dict[str, Any]:
    """The layout; options at their defaults are left out, so that a new option does not invalidate existing outputs."""
    return {"convert": config.convert.model_dump(exclude_defaults=True), "runtime": config.serve.runtime}


def serve_smoke(config: Config, context: Context) -> dict[str, Any]:
    """The server, its test questions, and the text that it scores."""
    serve = config.serve.model_dump(exclude={"process"})
    return {**_scored(config, context), "serve": serve, "environment": context.locks["server"]}


def evaluate(config: Config, context: Context) -> dict[str, Any]:
    """The text and all measurements on it."""
    evaluation = config.evaluate.model_dump()
    return {**_scored(config, context), "evaluate": evaluation, "environment": context.locks["reference"]}


def noise(config: Config, context: Context) -> dict[str, Any]:
    """The text, and the number of seeds."""
    return {
        **_scored(config, context), "noise": config.noise.model_dump(), "environment": context.locks["reference"],
    }  # fmt: skip


def speed(config: Config, context: Context) -> dict[str, Any]:
    """The benchmark and the server."""
    serve = config.serve.model_dump(include={"runtime", "max_model_len", "dtype", "enforce_eager"})
    return {"speed": config.speed.model_dump(), "serve": serve, "environment": context.locks["server"]}


def tasks(config: Config, context: Context) -> dict[str, Any]:
    """The tasks, and the server if it is one of the engines."""
    asked = config.tasks
    own: dict[str, Any] = {"tasks": asked.model_dump()}
    if not asked.any:
        return own
    path = located(context.root, asked.path)
    own.update(text=sha256_of(path) if path.is_file() else None, environment=context.locks["tasks"])
    own["max_length"] = config.serve.max_model_len
    if "vllm" in asked.engines:
        serving = config.serve.model_dump(exclude={"process", "smoke"})
        own.update(serve=serving, server=context.locks["server"])
    return own


def located(root: Path, path: str) -> Path:
    """A path in a configuration: `~` is the user's home, a relative path starts at the checkout."""
    return root / Path(path).expanduser()


def _scored(config: Config, context: Context) -> dict[str, Any]:
    path = located(context.root, config.evaluate.path) if config.evaluate.path else None
    text = sha256_of(path) if path is not None and path.is_file() else None
    return {"evaluate": config.evaluate.windows(), "text": text}


def _file_hashes(config: Config, root: Path) -> dict[str, str]:
    # A user's own text is identified by its hash; the stage that reads it reports a missing file.
    hashes = {}
    for name, source in config.calibration.sources.items():
        path = located(root, source.path) if source.path else None
        if path is not None and path.is_file():
            hashes[name] = sha256_of(path)
    return hashes


_WHOLE_FILE_BYTES = 256 * 2**20
_SAMPLES = 64


def _folder_content(folder: Path) -> dict[str, str]:
    # A model in a folder has no commit, so its files are hashed. Of large files, only the size, both ends and samples in
    # between are hashed, to avoid reading tens of gigabytes at the start. The full hashes are in the download's result.
    if not folder.is_dir():
        return {}
    known = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        stat = path.stat()
        known[path.name] = _content(path, stat.st_size, stat.st_mtime_ns)
    return known


@cache
def _content(path: Path, size: int, mtime_ns: int) -> str:
    if size <= _WHOLE_FILE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_SAMPLES + 1):
            file.seek((size - 2**16) * index // _SAMPLES)
            digest.update(file.read(2**16))
    return digest.hexdigest()
