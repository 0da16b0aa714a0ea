"""Fingerprints: one hash over the plain values that determine a stage's output.

A stage's fingerprint covers the options that it reads, the content of files that they name, the lock files of its
environments, the project's version and the stage's source files, and the fingerprints of the stages before it (of the one
file, where a stage reads only one of an earlier output). Where and how the stage ran (device, ports, paths of
interpreters) is recorded in the result, but is not part of the fingerprint. A fingerprint is known before a stage runs.
Values that are known only afterwards (token ids, tensors, the backend that `auto` selected) are in the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline import __version__
from quantline.core.files import sha256_of
from quantline.pipeline.code import code_files
from quantline.pipeline.config import Config
from quantline.pipeline.hashing import files_below
from quantline.pipeline.options import Context
from quantline.pipeline.stages import STAGES, before, is_baseline
from quantline.quantization import capabilities
from quantline.quantization.requirements import requirements_of
from quantline.toolchains.environments import locks_identity


def fingerprint(value: object) -> str:
    """SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def backends_of(config: Config) -> list[str]:
    """The backends that may quantize a variant; which of them does can depend on the model's family."""
    if config.frozen is not None:
        return config.frozen.backends
    if is_baseline(config):
        return []
    order = config.backends.get(config.method.name, [])
    return capabilities.candidates(config.backend, order, requirements_of(config.model_dump()))


def locks_of(backends: Sequence[str], root: Path) -> dict[str, str]:
    """Hashes of the lock files of a variant's environments, by role; the native backend has none.

    backends: those that may quantize it.
    """
    chains = [name for name in map(capabilities.toolchain_of, backends) if name is not None]
    locks = {name: locks_identity(root, name) for name in chains}
    server = next((one for one in map(capabilities.server_of, backends) if one), "vllm")
    quantizer = fingerprint(locks) if len(locks) > 1 else next(iter(locks.values()), "")
    return {
        "reference": locks_identity(root, "reference"),
        "server": locks_identity(root, server),
        "quantizer": quantizer,
        "tasks": locks_identity(root, "lm_eval"),
    }


def options_of(config: Config, stage: str, root: Path, file: str | None = None) -> dict[str, Any]:
    """The plain values that a stage itself reads: options, hashes of locks, and hashes of files that the options name.

    file: only those that determine this file of its output.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage named {stage}")
    locks = config.frozen.locks if config.frozen else locks_of(backends_of(config), root)
    entry = STAGES[stage]
    values = entry.decide.get(file, entry.options) if file else entry.options
    return values(config, Context(root, locks, backends_of(config)))


def identity(config: Config, stage: str, root: Path, file: str | None = None) -> dict[str, Any]:
    """The plain values that determine a stage's output; earlier stages are represented by their fingerprints.

    file: those that determine this file of the output.
    """
    takes = STAGES[stage].takes
    earlier = {name: stage_fingerprint(config, name, root, takes.get(name)) for name in before(config, stage)}
    options = options_of(config, stage, root, file)
    return {"stage": stage, "version": __version__, "code": code_files(stage), "options": options, "before": earlier}


def stage_fingerprint(config: Config, stage: str, root: Path, file: str | None = None) -> str:
    """The fingerprint of a stage for a configuration, or that of one file of its output."""
    return fingerprint(identity(config, stage, root, file))


def options_fingerprint(config: Config, stage: str, root: Path) -> str:
    """The fingerprint of the options of a stage alone, without the stages before it."""
    return fingerprint(options_of(config, stage, root))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path relative to it, in order."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files_below(folder)}


def differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The files whose hashes differ or that only one of the two has, sorted."""
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def combined(hashes: Mapping[str, str]) -> str:
    """One hash over the hashes of a folder's files."""
    return fingerprint(dict(hashes))
