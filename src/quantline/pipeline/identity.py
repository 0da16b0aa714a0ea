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
    """The backends that may come to quantize a variant; which of them does can depend on the model's family."""
    if config.frozen is not None:
        return config.frozen.backends
    if is_baseline(config):
        return []
    order = config.backends.get(config.method.name, [])
    return capabilities.candidates(config.backend, order, requirements_of(config.model_dump()))


def locks_of(backends: Sequence[str], root: Path) -> dict[str, str]:
    """Hash of the locks of the environments that a variant computes in, by role; the native backend has none.

    backends: that may come to quantize it.
    """
    chains = [name for name in map(capabilities.toolchain_of, backends) if name is not None]
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
    if stage not in STAGES:
        raise ValueError(f"no stage named {stage}")
    locks = config.frozen.locks if config.frozen else locks_of(backends_of(config), root)
    return STAGES[stage].options(config, Context(root, locks, backends_of(config)))


def identity(config: Config, stage: str, root: Path) -> dict[str, Any]:
    """The plain values that a stage's output follows from, those of the stages before it by their fingerprints."""
    earlier = {name: stage_fingerprint(config, name, root) for name in before(config, stage)}
    return {
        "stage": stage, "version": __version__, "code": code_files(stage), "options": options_of(config, stage, root),
        "before": earlier,
    }  # fmt: skip


def stage_fingerprint(config: Config, stage: str, root: Path) -> str:
    """The fingerprint of a stage under a configuration."""
    return fingerprint(identity(config, stage, root))


def options_fingerprint(config: Config, stage: str, root: Path) -> str:
    """The fingerprint of what a stage itself reads, whatever the stages before it did."""
    return fingerprint(options_of(config, stage, root))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path relative to it, in order."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files_below(folder)}


def differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The files whose hashes differ, and those that only one of the two has, sorted."""
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def combined(hashes: Mapping[str, str]) -> str:
    """One hash over a folder's file hashes."""
    return fingerprint(dict(hashes))
