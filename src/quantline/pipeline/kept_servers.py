"""Which servers stay up between the stages of a `dvc repro`, and when they make room; see `quantline.serving.keeping`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from quantline.pipeline.config import Config
from quantline.pipeline.stages import STAGES

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun
    from quantline.serving.keeping import Keeping, Role

# The stages that talk to a server. `convert` knows the server's version alone.
SERVED = ("serve_smoke", "tasks", "speed")
# What a stage that computes should find available beside servers that wait: its process, and two models in float32, which is
# four times the files of a model of 16 bits.
_PROCESS_BYTES, _TIMES = 2 * 2**30, 4


def owner() -> int | None:
    """The process of DVC that runs this stage; None for a stage by hand.

    It is the nearest process above this one that was started without the name of a stage in its environment.
    """
    if "DVC_STAGE" not in os.environ:
        return None
    with suppress(psutil.Error):
        process = psutil.Process().parent()
        while process is not None and process.pid > 1:
            if "DVC_STAGE" not in process.environ():
                return process.pid
            process = process.parent()
    return None


def keeping_of(run: StageRun, role: Role | None = None, *, fresh: bool = False) -> Keeping | None:
    """How a stage shares a server; None for a run by hand, or where no other stage would ask for the same server.

    Args:
        run: the stage, which has named the checkpoint as its input.
        role: whose server it is; None for that of the run's own checkpoint.
        fresh: the stage measures how a server loads, and takes none over.
    """
    from quantline.serving.keeping import Keeping

    of = owner() if run.frozen else None
    role = role or ("float" if run.is_baseline else "variant")
    # On a GPU the speed is measured with graphs, and the memory that a server took while it loaded.
    if of is None or (run.stage == "speed" and run.device == "cuda"):
        return None
    onward = _wanted_after(run.stage, run.config, role, run.device)
    content = run.inputs["download" if role == "float" else run.checkpoint_stage]
    return Keeping(of, role, content, run.stage, onward, fresh)


def _wanted_after(stage: str, config: Config, role: Role, device: str) -> bool:
    """Whether a later stage asks for the server of `stage`, in the order of dvc.yaml: serve_smoke, tasks, speed."""
    by_speed = config.speed.by_server and device != "cuda"
    if stage == "speed":
        return by_speed and role == "float"  # for the next variant
    return by_speed or (stage == "serve_smoke" and "vllm" in config.tasks.engines)


def make_room(stage: str, model: Path) -> None:
    """End the servers that wait, where a stage needs their place. Stages that share servers see to that themselves.

    Servers stay up while a stage computes on the CPU and there is memory for it beside them. On a GPU none stays, also not
    for `speed`, which shares none there.

    Args:
        stage: that begins.
        model: the folder of the float model.
    """
    of = owner()
    if of is None or stage not in STAGES:
        return
    if stage in SERVED:
        if stage == "speed" and _gpu_is_there():
            end_servers()
        return
    size = sum(path.stat().st_size for path in model.glob("*") if path.is_file())
    if psutil.virtual_memory().available < _PROCESS_BYTES + _TIMES * size or _gpu_is_there():
        end_servers()


def end_servers() -> None:
    """End all servers that wait for a stage of this `dvc repro`."""
    from quantline.serving.handover import end_all

    if (of := owner()) is not None:
        end_all(of)


def _gpu_is_there() -> bool:
    from quantline.core.gpu import visible_gpus

    return bool(visible_gpus())
