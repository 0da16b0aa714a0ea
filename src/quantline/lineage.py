"""Fingerprints: what a stage's output follows from, as one hash over plain values.

A stage's fingerprint covers the part of the configuration that it reads, the locks of the environments it computes in, the
project's version, and the fingerprints of the stages before it. Where and how it ran (device, ports, paths of
interpreters) is recorded beside it and is no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from quantline import __version__
from quantline.config import Config
from quantline.toolchains import locks_identity, sha256_of

# backend -> the toolchain that it runs in; None is this interpreter.
TOOLCHAIN_OF: dict[str, str | None] = {"autoawq": "autoawq", "auto_gptq": "auto_gptq", "native": None, "none": None}


def fingerprint(value: object) -> str:
    """SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def locks_of(config: Config, root: Path) -> dict[str, str]:
    """Hash of the locks of the environments that a variant computes in, by role; the native backend has none."""
    roles = {"reference": "reference", "server": "vllm", "quantizer": TOOLCHAIN_OF[config.method.backend]}
    return {role: locks_identity(root, name) if name else "" for role, name in roles.items()}


def identity(config: Config, stage: str, root: Path) -> dict[str, Any]:
    """The plain values that a stage's output follows from, those of the stages before it by their fingerprints."""
    locks = config.frozen.locks if config.frozen else locks_of(config, root)
    quantized = config.method.name != "float"

    def before(name: str) -> str:
        return fingerprint(identity(config, name, root))

    own: dict[str, Any] = {"stage": stage, "version": __version__}
    if stage == "download":
        own.update(model=config.model.model_dump(exclude={"name"}), reference=locks["reference"])
        own.update(content=_folder_content(root / config.model.path) if config.model.path else None)
    elif stage == "calibrate":
        own.update(
            calibration=config.calibration.model_dump(), files=_file_hashes(config, root), model=before("download")
        )
    elif stage == "quantize":
        own.update(method=config.method.model_dump(), bits=config.bits, group_size=config.group_size)
        own.update(seed=config.seed, threads=config.threads, model=before("download"))
        if TOOLCHAIN_OF[config.method.backend] is not None:
            own.update(calibration=before("calibrate"), environment=locks["quantizer"])
    elif stage == "convert":
        own.update(convert=config.convert.model_dump(), runtime=config.serve.runtime, quantized=before("quantize"))
    elif stage == "serve_smoke":
        own.update(serve=config.serve.model_dump(exclude={"process"}), evaluate=config.evaluate.model_dump())
        own.update(checkpoint=before("convert" if quantized else "download"), environment=locks["server"])
    elif stage == "evaluate":
        own.update(evaluate=config.evaluate.model_dump(), served=before("serve_smoke"), environment=locks["reference"])
    else:
        raise ValueError(f"no stage named {stage}")
    return own


def stage_fingerprint(config: Config, stage: str, root: Path) -> str:
    """The fingerprint of a stage under a configuration."""
    return fingerprint(identity(config, stage, root))


def _file_hashes(config: Config, root: Path) -> dict[str, str]:
    # A user's own text is known by its content; a missing file is reported by the stage that reads it.
    hashes = {}
    for name, source in config.calibration.sources.items():
        path = root / source.path if source.path else None
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
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def combined(hashes: Mapping[str, str]) -> str:
    """One hash over a folder's file hashes."""
    return fingerprint(dict(hashes))
