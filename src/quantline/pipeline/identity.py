"""Fingerprints: what a stage's output follows from, as one hash over plain values.

A stage's fingerprint covers the part of the configuration that it reads, the content of files that this names, the locks
of the environments it computes in, the project's version and its source files, and the fingerprints of the stages before
it. Where and how it ran (device, ports, paths of interpreters) is recorded beside it and is no part of it. A fingerprint is
known before a stage runs; what is exact only afterwards (token ids, tensors, the backend that `auto` came to) is in its
result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from quantline import __version__
from quantline.core.files import sha256_of
from quantline.pipeline.code import code_files
from quantline.pipeline.config import Config
from quantline.pipeline.hashing import files_below
from quantline.quantization import capabilities
from quantline.quantization.requirements import wish_of
from quantline.toolchains.environments import locks_identity


def fingerprint(value: object) -> str:
    """SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def backends_of(config: Config) -> list[str]:
    """The backends that may come to quantize a variant; which of them does can depend on the model's family."""
    if config.frozen is not None:
        return config.frozen.backends
    if config.method.name == "float":
        return []
    order = config.backends.get(config.method.name, [])
    return capabilities.candidates(config.backend, order, wish_of(config.model_dump()))


def locks_of(config: Config, root: Path) -> dict[str, str]:
    """Hash of the locks of the environments that a variant computes in, by role; the native backend has none."""
    chains = [name for name in map(capabilities.toolchain_of, backends_of(config)) if name is not None]
    locks = {name: locks_identity(root, name) for name in chains}
    quantizer = fingerprint(locks) if len(locks) > 1 else next(iter(locks.values()), "")
    return {
        "reference": locks_identity(root, "reference"),
        "server": locks_identity(root, "vllm"),
        "quantizer": quantizer,
        "tasks": locks_identity(root, "lm_eval"),
    }


def options_of(config: Config, stage: str, root: Path) -> dict[str, Any]:
    """The plain values that a stage itself reads: options, locks, and the content of files that the options name."""
    locks = config.frozen.locks if config.frozen else locks_of(config, root)
    if stage == "download":
        content = _folder_content(located(root, config.model.path)) if config.model.path else None
        model = config.model.model_dump(exclude={"name"})
        return {"model": model, "content": content, "reference": locks["reference"]}
    if stage == "calibrate":
        return {"calibration": config.calibration.model_dump(), "files": _file_hashes(config, root)}
    if stage == "quantize":
        own = {"method": config.method.model_dump(), "bits": config.bits, "group_size": config.group_size}
        own.update(backends=backends_of(config), seed=config.seed, threads=config.threads, dtype=config.dtype)
        own.update(coverage=config.coverage.model_dump())
        own.update(layers=config.layers.model_dump(), lm_head=config.lm_head, low_memory=config.low_memory)
        return {**own, "environment": locks["quantizer"]}
    if stage == "convert":
        # What is at its default is left out, so that an option more does not make another output of all there are.
        return {"convert": config.convert.model_dump(exclude_defaults=True), "runtime": config.serve.runtime}
    if stage == "speed":
        serve = config.serve.model_dump(include={"runtime", "max_model_len", "dtype", "enforce_eager"})
        return {"speed": config.speed.model_dump(), "serve": serve, "environment": locks["server"]}
    if stage == "tasks":
        return _tasks_options(config, root, locks)
    if stage not in ("serve_smoke", "evaluate", "noise"):
        raise ValueError(f"no stage named {stage}")
    own = {"evaluate": config.evaluate.windows(), "text": _text_hash(config, root)}
    if stage == "serve_smoke":
        return {**own, "serve": config.serve.model_dump(exclude={"process"}), "environment": locks["server"]}
    if stage == "noise":
        return {**own, "noise": config.noise.model_dump(), "environment": locks["reference"]}
    return {**own, "evaluate": config.evaluate.model_dump(), "environment": locks["reference"]}


def _tasks_options(config: Config, root: Path, locks: Mapping[str, str]) -> dict[str, Any]:
    asked = config.tasks
    own: dict[str, Any] = {"tasks": asked.model_dump()}
    if not asked.any:
        return own
    path = located(root, asked.path)
    own.update(text=sha256_of(path) if path.is_file() else None, environment=locks["tasks"])
    own["max_length"] = config.serve.max_model_len
    if "vllm" in asked.engines:
        serving = config.serve.model_dump(exclude={"process", "smoke"})
        own.update(serve=serving, server=locks["server"])
    return own


def stages_before(config: Config, stage: str) -> tuple[str, ...]:
    """The stages whose outputs a stage's output follows from, the nearest ones."""
    if stage == "quantize":
        return ("download", "calibrate") if config.method.name in capabilities.CALIBRATED else ("download",)
    if stage == "serve_smoke":
        return ("download",) if config.method.name == "float" else ("convert",)
    return {
        "calibrate": ("download",), "convert": ("quantize",), "evaluate": ("serve_smoke",), "noise": ("quantize",),
        "speed": ("convert",),
        "tasks": ("serve_smoke",),
    }.get(stage, ())  # fmt: skip


def identity(config: Config, stage: str, root: Path) -> dict[str, Any]:
    """The plain values that a stage's output follows from, those of the stages before it by their fingerprints."""
    before = {name: stage_fingerprint(config, name, root) for name in stages_before(config, stage)}
    return {
        "stage": stage, "version": __version__, "code": code_files(stage), "options": options_of(config, stage, root),
        "before": before,
    }  # fmt: skip


def stage_fingerprint(config: Config, stage: str, root: Path) -> str:
    """The fingerprint of a stage under a configuration."""
    return fingerprint(identity(config, stage, root))


def options_fingerprint(config: Config, stage: str, root: Path) -> str:
    """The fingerprint of what a stage itself reads, whatever the stages before it did."""
    return fingerprint(options_of(config, stage, root))


def located(root: Path, path: str) -> Path:
    """A path of a configuration: `~` is the user's home, a relative one begins at the checkout."""
    return root / Path(path).expanduser()


def _text_hash(config: Config, root: Path) -> str | None:
    path = located(root, config.evaluate.path) if config.evaluate.path else None
    return sha256_of(path) if path is not None and path.is_file() else None


def _file_hashes(config: Config, root: Path) -> dict[str, str]:
    # A user's own text is known by its content; a missing file is reported by the stage that reads it.
    hashes = {}
    for name, source in config.calibration.sources.items():
        path = located(root, source.path) if source.path else None
        if path is not None and path.is_file():
            hashes[name] = sha256_of(path)
    return hashes


_WHOLE_FILE_BYTES = 256 * 2**20
_SAMPLES = 64


def _folder_content(folder: Path) -> dict[str, str]:
    # A model in a folder has no commit. Its files are known by content; the large ones by their size, both ends and samples
    # between, so that a stage does not begin by reading tens of gigabytes. The full hashes are in the download's result.
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


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path relative to it, in order."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files_below(folder)}


def differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The files whose hashes differ, and those that only one of the two has, sorted."""
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def combined(hashes: Mapping[str, str]) -> str:
    """One hash over a folder's file hashes."""
    return fingerprint(dict(hashes))
