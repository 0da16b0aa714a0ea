"""Locates a checkpoint's linears in a model that may stack or fuse them, and marks those whose calls cannot be observed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint, to_float32
from quantline.checkpoints.linears import place_of

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass
class Linear:
    """One linear. `weight` (out, in) is the float model's, a view of it if its calls can be observed (`seen`)."""

    name: str
    weight: Tensor
    seen: bool = True
    tokens: int = 0
    error: float = 0.0  # ||X(W'-W)^T||^2
    energy: float = 0.0  # ||X W^T||^2
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass
class WeightLocation:
    """A weight matrix that the model multiplies by, and the linears that are rows of it."""

    shape: tuple[int, ...]
    parts: list[tuple[int, Linear]] = field(default_factory=list)


def locate(model: Any, floats: Checkpoint, names: Sequence[str]) -> tuple[list[Linear], dict[int, WeightLocation]]:
    """Find linears in the model, by name or, if it stacks or fuses them, by their values.

    Returns:
        The linears in the order of `names`, and memory address -> the weight there.
    """
    import torch

    parameters = dict(model.named_parameters())
    by_layer: dict[int, list[Any]] = defaultdict(list)
    for name, parameter in parameters.items():
        if parameter.ndim in (2, 3) and (layer := place_of(name)[0]) >= 0:
            by_layer[layer].append(parameter)
    linears: list[Linear] = []
    places: dict[int, WeightLocation] = {}
    for name in names:
        parameter = parameters.get(f"{name}.weight")
        if parameter is not None and tuple(parameter.shape) == tuple(floats.info(f"{name}.weight").shape):
            whole, start, linear = parameter, 0, Linear(name, parameter)
        else:
            values = np.require(to_float32(floats.tensor(f"{name}.weight")), requirements=["C", "W"])
            weight = torch.from_numpy(values).to(model.device)
            found_in = _search(name, weight, by_layer[place_of(name)[0]])
            if found_in is None:
                linears.append(Linear(name, weight, seen=False))
                continue
            whole, start = found_in
            linear = Linear(name, whole[start : start + len(weight)])
        place = places.setdefault(whole.data_ptr(), WeightLocation(tuple(whole.shape)))
        place.parts.append((start, linear))
        linears.append(linear)
    return linears, places


def _search(name: str, weight: Tensor, parameters: Sequence[Any]) -> tuple[Any, int] | None:
    """The model's matrix that contains `weight` as rows, and the first of these rows."""
    import torch

    expert = _EXPERT.search(name)
    for parameter in parameters:
        if parameter.ndim == 3 and expert and int(expert[1]) < len(parameter):
            whole = parameter[int(expert[1])]
        elif parameter.ndim == 2:
            whole = parameter
        else:
            continue
        if whole.shape[1] != weight.shape[1]:
            continue
        for start in range(0, len(whole) - len(weight) + 1, len(weight)):
            if torch.equal(whole[start : start + len(weight)], weight):
                return whole, start
    return None


def mark_unseen(linears: Sequence[Linear]) -> None:
    """After a run, mark the linears whose calls cannot be observed, as opposed to those that got no tokens.

    Only an expert can get no tokens. So if all experts of a layer, or another linear, got none, the model does not multiply
    by that weight directly.
    """
    totals: dict[str, int] = defaultdict(int)
    for linear in linears:
        totals[_EXPERT.sub(".experts.*.", linear.name)] += linear.tokens
    for linear in linears:
        linear.seen = linear.seen and totals[_EXPERT.sub(".experts.*.", linear.name)] > 0
