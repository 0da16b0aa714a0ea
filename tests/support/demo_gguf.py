"""The demo model as a GGUF file, made by the real worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.linears import select_linears
from quantline.checkpoints.model_config import read_config
from quantline.quantization.quantize import with_own_types
from quantline.toolchains import environments
from quantline.toolchains.runner import run_worker

REFERENCE = "quantline.toolchains.workers.reference"
Run = Callable[..., Any]


def runner(root: Path, logs: Path) -> Run:
    """Run a worker's job: (toolchain, module, job, label) -> its result."""

    def start(toolchain: str, module: str, job: dict[str, Any], label: str = "") -> Any:
        found = environments.ensure(root, toolchain)
        return run_worker(found, module, job, log=logs / f"{module}.log", threads=1, label=label or module)

    return start


def demo_gguf(root: Path, run: Run, folder: Path) -> Path:
    """The demo model in Q4_K_M, without an importance matrix; returns its folder below `folder`."""
    model = root / "assets/demo/model"
    ids = np.random.default_rng(0).integers(0, 4000, (1, 32)).tolist()
    job: dict[str, Any] = {"checkpoint": str(model), "input_ids": ids, "output": str(folder / "probe")}
    run("reference", f"{REFERENCE}.engine", job)
    (folder / "probe").rename(folder / "probe.safetensors")
    options, source, config = {"type": "Q4_K_M", "imatrix": False}, Checkpoint.open(model), read_config(model)
    widths, _ = with_own_types("gguf", options, source, config, select_linears(source, config, bits=4, group_size=32))
    (folder / "out").mkdir()
    job = {
        "model": str(model), "output": str(folder / "out"), "work": str(folder / "work"), "calibration": None,
        "probe": str(folder / "probe.safetensors"), "probe_tolerance": 1e-3, "bits": 4, "group_size": 32, "seed": 0,
        "threads": 1, "device": "cpu", "options": options,
        "linears": {name: asdict(width) for name, width in widths.items()},
    }  # fmt: skip
    run("llamacpp", "quantline.toolchains.workers.quantizers.llamacpp", job)
    return folder / "out"
