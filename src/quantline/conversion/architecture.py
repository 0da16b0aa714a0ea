"""Checks the names and shapes of a checkpoint's tensors against the architecture that its config.json names.

transformers' own model is built without memory for its weights, in the reference environment, and asked which tensors it
misses, does not know, or has in another shape. Without that environment only `quantline.conversion.structure` speaks, and
the proof says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from quantline.checkpoints.safetensors_file import to_float32
from quantline.conversion.source import Source
from quantline.conversion.structure import contradictions, held
from quantline.toolchains.protocol import JobResult

# A job of the worker `quantline.toolchains.workers.reference.architecture` -> its result.
RunWorker = Callable[[dict[str, Any]], JobResult]
MODULE = "quantline.toolchains.workers.reference.architecture"
LABEL = "compare with the architecture"


@dataclass(frozen=True)
class ArchitectureCheck:
    """What the names and shapes were compared with. by: the library's version and class; None if with no architecture."""

    by: str | None
    note: str

    def entry(self) -> dict[str, Any]:
        """Its entry in the proof."""
        return {"checked": self.by is not None, "by": self.by, "note": self.note}

    def line(self) -> str:
        """A line for a terminal."""
        return f"names and shapes are those of {self.by}" if self.by else self.note


_NOT = "names and shapes were not checked against the architecture"
NOT_CHECKED = ArchitectureCheck(None, _NOT)


def check_architecture(source: Source, run_worker: RunWorker | None) -> tuple[Source, ArchitectureCheck]:
    """The source, with what contradicts its architecture among its faults; and what it was compared with."""
    found, unknown = contradictions(source)
    source = replace(source, faults=(*source.faults, *found))
    inner = (
        f"its layers were not compared, because {unknown}" if unknown else "its layers were compared with each other"
    )
    if source.faults:
        return source, NOT_CHECKED
    if run_worker is None:
        return source, ArchitectureCheck(None, f"{_NOT}: that needs the environment reference; {inner}")
    if not source.config.get("model_type"):
        return source, ArchitectureCheck(None, f"{_NOT}: config.json has no model_type")
    answer = run_worker(_job(source)).data
    if answer["unknown"]:
        return source, ArchitectureCheck(None, f"{_NOT}: {answer['unknown']}; {inner}")
    by = f"transformers {answer['version']}, {answer['class']}"
    faults = [
        f"{fault}; {by} is what config.json names: does it belong to these weights?" for fault in answer["faults"]
    ]
    return replace(source, faults=tuple(faults)), ArchitectureCheck(by, "every name and every shape agrees")


def _job(source: Source) -> dict[str, Any]:
    tensors = held(source)
    biases = [f"{name}.bias" for name in source.layers if f"{name}.bias" in source.carried]
    return {
        "config": str(source.folder),
        "shapes": {name: list(one.shape) for name, one in tensors.items()},
        # Some quantizers add these to linears without a bias.
        "zero_biases": [name for name in biases if not to_float32(source.tensors.read(source.carried[name])).any()],
    }
