"""Tiny models and workers of the toolchains, once per session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.linears import linear_shapes
from quantline.core.errors import WorkerError
from quantline.toolchains import environments, runner
from quantline.toolchains import toolchain as toolchain_module

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="session")
def models(root, tmp_path_factory):
    """Folder of tiny models: <name>/{model/, tokens.safetensors, probe.safetensors}."""
    folder = tmp_path_factory.mktemp("models")
    python = environments.ensure(root, "reference").python
    command = [python, SCRIPTS / "make_models.py", folder]
    done = subprocess.run(
        command, env=toolchain_module.worker_environment(1), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def job_for(models, tmp_path_factory):
    """A quantize job on one of the models."""
    outputs = tmp_path_factory.mktemp("outputs")

    def build(model: str, label: str, *, bits: int = 4, group_size: int = 64, **values):
        folder = models / model
        return {
            "model": str(folder / "model"), "output": str(outputs / label),
            "calibration": str(folder / "tokens.safetensors"), "probe": str(folder / "probe.safetensors"),
            "probe_tolerance": 1e-3, "bits": bits, "group_size": group_size, "seed": 0, "threads": 1, "device": "cpu",
            "options": {}, **values,
        }  # fmt: skip

    return build


@pytest.fixture(scope="session")
def some_linears(models):
    """What a job asks for when the first decoder layer and every down projection stay float: name -> width."""
    names = linear_shapes(Checkpoint.open(models / "qwen2" / "model"), {})
    kept = [name for name in names if not name.startswith("model.layers.0.") and not name.endswith("down_proj")]
    assert 0 < len(kept) < len(names)
    return {name: {"bits": 4, "group_size": 64} for name in kept}


@pytest.fixture(scope="session")
def work(root, tmp_path_factory):
    """Run a module in a toolchain, the scripts beside this file included; returns the result's data."""
    logs = tmp_path_factory.mktemp("logs")

    def start(toolchain: str, module: str, job):
        extra = {"PYTHONPATH": f"{root / 'src'}:{SCRIPTS}"}
        if "output" in job:
            Path(job["output"]).mkdir(parents=True)
        return runner.run_worker(
            environments.ensure(root, toolchain), module, job, log=logs / f"{toolchain}-{module}.log", threads=1,
            label=module, extra_environment=extra,
        ).data  # fmt: skip

    return start


@pytest.fixture(scope="session")
def killed(work):
    """Run a backend's job until kill -9 ends it at a step, see scripts/killed.py; its output, not complete, is removed."""

    def run(backend: str, job, **step) -> None:
        with pytest.raises(WorkerError, match="killed by signal 9"):
            work(backend, "killed", {"backend": backend, "job": job, **step})
        shutil.rmtree(job["output"])

    return run
