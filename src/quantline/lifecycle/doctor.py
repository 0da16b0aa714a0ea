"""What this machine and this project have, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from quantline.core.files import sha256_of
from quantline.core.gpu import visible_gpus
from quantline.core.text import binary_size, decimal_size
from quantline.serving.rules import cpu_instructions
from quantline.toolchains.environments import (
    HEALTH_CHECKS,
    detect_platform,
    environment_folder,
    environment_state,
    lock_file,
)

# Below this, the environments (5 GB) and the outputs of a small model do not fit.
ENOUGH_DISK = 10e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. remedy: what to do, empty where nothing is to be done."""

    about: str
    fact: str
    good: bool = True
    remedy: str = ""


def examine(root: Path) -> list[Finding]:
    """Look at everything that the pipeline needs, without changing anything. root: the project."""
    return [*_machine(root), *_project(root), *_environments(root)]


def _machine(root: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", version, (3, 11) <= sys.version_info[:2] < (3, 13), "")
    for tool, why in (("git", "DVC and lineage need it"), ("uv", "it builds the environments")):
        beside = Path(sys.executable).with_name(tool)
        found = str(beside) if beside.exists() else shutil.which(tool)
        yield Finding(tool, found or "not found", found is not None, "" if found else f"install {tool}: {why}")
    free = shutil.disk_usage(root).free
    enough = free >= ENOUGH_DISK
    yield Finding(
        "disk", f"{decimal_size(free)} free", enough,
        "" if enough else f"free some: the environments and a small model need {decimal_size(ENOUGH_DISK)}",
    )  # fmt: skip
    memory = psutil.virtual_memory()
    yield Finding(
        "memory", f"{binary_size(memory.total)}, {binary_size(memory.available)} free; {os.cpu_count()} cores"
    )
    if detect_platform() == "cuda":
        gpus = visible_gpus()
        shown = ", ".join(f"{gpu.name} ({binary_size(gpu.memory_total_bytes)})" for gpu in gpus)
        yield Finding(
            "GPU", shown or "a driver, but no GPU that it shows", bool(gpus),
            "" if gpus else "check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    else:
        yield Finding("GPU", "none; everything runs on the CPU")
        best = cpu_instructions()
        fact = {"avx512": "AVX-512", "avx2": "AVX2: vLLM serves no 4-bit weights here", "none": "no AVX2"}
        yield Finding("instructions", fact.get(str(best), "not an x86 CPU"))


def _project(root: Path) -> Iterator[Finding]:
    parts = ("conf/config.yaml", "params.yaml", "dvc.yaml", ".dvc/config")
    missing = [part for part in parts if not (root / part).is_file()]
    yield Finding(
        "project", f"{root}, without {', '.join(missing)}" if missing else str(root), not missing,
        "make one with `quantline init to=DIR`, and go there" if missing else "",
    )  # fmt: skip
    inside = any((folder / ".git").exists() for folder in (root, *root.parents))
    yield Finding("repository", "git" if inside else "none", inside, "" if inside else "run `git init`: DVC needs it")


def _environments(root: Path) -> Iterator[Finding]:
    platform = detect_platform()
    for name in HEALTH_CHECKS:
        lock = lock_file(root, name, platform)
        if not lock.is_file():
            continue
        built = environment_state(environment_folder(root, name, platform)) == sha256_of(lock)
        yield Finding(f".venvs/{lock.stem}", "built" if built else "not built; the first stage that needs it builds it")
