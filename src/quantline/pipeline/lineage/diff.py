"""The first difference between two lineages: the first stage and plain value in which they differ.

The stages are compared in order. For each stage, the identity is compared first (options, locks, source files), then the
output (tensors, files, metrics). Times and folders always differ and are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.safetensors_file import SafetensorsFile, to_float32
from quantline.pipeline.lineage.chain import Lineage
from quantline.pipeline.stages import STAGES

# Metrics of time and memory, which differ between equal runs.
_CIRCUMSTANTIAL = re.compile(
    r"seconds|latency|per_second|throughput|speed_up|slower_than_float|_ms(_|$)|memory|rss|(^|/)load_"
)
# Scores from a server depend on how requests were batched. This is the relative tolerance for them.
SERVER_TOLERANCE = 1e-3
_SERVER = re.compile(r"vllm|engine|served|answer")
MISSING = "nothing"


@dataclass(frozen=True)
class Difference:
    """One value that differs.

    stage, kind (identity, environment, input, tensor, file, metric, stage), key: which value. one, other: the value in each
    lineage, as text. more: other keys of the same kind and stage that differ. notes: possible explanations.
    """

    stage: str
    kind: str
    key: str
    one: str
    other: str
    more: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The difference as text."""
        text = f"{self.stage}, {self.kind} {self.key}: {self.one} | {self.other}"
        if self.more:
            shown = ", ".join(self.more[:6]) + (f" and {len(self.more) - 6} more" if len(self.more) > 6 else "")
            text += f"\n  also: {shown}"
        return "\n  ".join([text, *self.notes])


def first_difference(one: Lineage, other: Lineage, stages: tuple[str, ...] | None = None) -> Difference | None:
    """The first value in which two lineages differ, by the order of the stages; None if they are equal.

    stages: only these; by default every stage of either lineage.
    """
    for stage in stages or tuple(dict.fromkeys([*one.results, *other.results])):
        found = stage_difference(stage, one, other)
        if found is not None:
            return found
    return None


def stage_difference(stage: str, one: Lineage, other: Lineage) -> Difference | None:
    """The first value in which one stage of two lineages differs."""
    ours, theirs = one.results.get(stage), other.results.get(stage)
    if ours is None or theirs is None:
        if ours is theirs:
            return None
        states = ["ran" if result else MISSING for result in (ours, theirs)]
        return Difference(stage, "stage", stage, states[0], states[1])
    identity = _compared(stage, "identity", _identity(ours), _identity(theirs))
    return identity or outcome_difference(stage, one, other)


def outcome_difference(stage: str, one: Lineage, other: Lineage, *, exact: bool = False) -> Difference | None:
    """The first difference in the output of a stage that both lineages have.

    exact: compare the files of every stage, as for a copy.
    """
    ours, theirs = one.results[stage], other.results[stage]
    found = None
    if exact or STAGES[stage].exact:
        folders = one.folders.get(stage), other.folders.get(stage)
        found = _tensor_difference(stage, ours, theirs, folders)
        found = found or _compared(stage, "file", ours.get("outputs"), theirs.get("outputs"))
    found = found or _compared(stage, "metric", _metrics(ours), _metrics(theirs))
    found = found or _compared(stage, "result", _status(ours), _status(theirs))
    if found is not None:
        found.notes.extend(_circumstances(ours, theirs))
    return found


def flat(values: object, prefix: str = "") -> dict[str, Any]:
    """Nested plain values with dotted keys; an empty mapping or list counts as a value."""
    if isinstance(values, Mapping) and values:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], Mapping):
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(values)]
    else:
        return {prefix: values}
    return {key: value for name, inner in items for key, value in flat(inner, name).items()}


def _identity(result: Mapping[str, Any]) -> dict[str, Any]:
    identity = result.get("identity") or {}
    # Earlier stages are compared on their own. Options come first, since they say more than source files.
    parts = {key: identity[key] for key in ("options", "version", "code") if key in identity}
    return flat(parts) if parts else {"fingerprint": result.get("fingerprint")}


def _metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = result.get("metrics") or {}
    return {name: value for name, value in metrics.items() if not _CIRCUMSTANTIAL.search(name)}


def _status(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": result.get("status")}


def _compared(
    stage: str, kind: str, ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> Difference | None:
    ours, theirs = ours or {}, theirs or {}
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if not _same(kind, key, ours.get(key), theirs.get(key))]
    if not keys:
        return None
    first = keys[0]
    return Difference(stage, kind, first, _shown(ours, first), _shown(theirs, first), keys[1:])


def _same(kind: str, key: str, one: Any, other: Any) -> bool:
    if one == other or (one != one and other != other):  # noqa: PLR0124 - NaN equals NaN here
        return True
    if kind != "metric" or not _SERVER.search(key) or not isinstance(one, float) or not isinstance(other, float):
        return False
    return abs(one - other) <= SERVER_TOLERANCE * max(1.0, abs(one), abs(other))


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return MISSING
    text = str(values[key])
    return text if len(text) <= 200 else text[:200] + "..."


def _circumstances(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    one, other = (flat(result.get("environment") or {}) for result in (ours, theirs))
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    return [f"made with another {key}: {_shown(one, key)} | {_shown(other, key)}" for key in keys]


def _tensor_difference(
    stage: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], folders: tuple[Path | None, Path | None]
) -> Difference | None:
    found = _compared(stage, "tensor", ours.get("tensors"), theirs.get("tensors"))
    if found is not None and folders[0] is not None and folders[1] is not None:
        found.notes.extend(tensor_notes(found.key, folders[0], folders[1]))
    return found


def tensor_notes(name: str, one: Path, other: Path) -> list[str]:
    """How a tensor differs between two folders on this disk: in dtype and shape, else the first element that differs."""
    inner = name.rpartition(":")[2]
    file, other_file = (_file_with(folder, name) for folder in (one, other))
    if file is None or other_file is None:
        return []
    info = file.infos[inner]
    types = [f"{item.dtype} {list(item.shape)}" for item in (info, other_file.infos[inner])]
    if types[0] != types[1]:
        return [f"dtype and shape: {types[0]} | {types[1]}"]
    ours, theirs = file.view(inner).reshape(-1), other_file.view(inner).reshape(-1)
    unequal = np.flatnonzero(_bits(ours) != _bits(theirs))
    if not unequal.size:
        return ["the files on this disk have equal values, so they no longer match the results"]
    element = int(unequal[0])
    at = [int(index) for index in np.unravel_index(element, info.shape)] if info.shape else []
    values = [to_float32(array[element : element + 1])[0] if array.dtype.kind not in "iub" else array[element]
              for array in (ours, theirs)]  # fmt: skip
    return [f"{types[0]}, {unequal.size} of {ours.size} elements; the first is {at}: {values[0]!s} | {values[1]!s}"]


def _file_with(folder: Path, name: str) -> SafetensorsFile | None:
    """The file with a tensor; `name` is the tensor's name, or `file:tensor`."""
    file, _, inner = name.rpartition(":")
    paths = [folder / file] if file else sorted(folder.rglob("*.safetensors"))
    for path in paths:
        if path.is_file():
            opened = SafetensorsFile.open(path)
            if inner in opened.infos:
                return opened
    return None


def _bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # Bit patterns: a NaN equals itself, and -0.0 is not 0.0.
    return values.view(f"u{values.dtype.itemsize}")
