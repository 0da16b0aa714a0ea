"""Locates a checkpoint's linears in a model that may stack or fuse them, and marks those whose calls cannot be observed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.checkpoints.float_view import FloatView

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass
class Linear:
    """One linear.

    `weight` (out, in) is the float model's: while its part has its weights, a view of them if its calls can be observed
    (`seen`).
    """

    name: str
    weight: Tensor | None = None
    rows: int = 0
    seen: bool = False
    tokens: int = 0  # that reach it
    measured: int = 0  # of which its errors are measured
    error: float = 0.0  # ||X(W'-W)^T||^2
    energy: float = 0.0  # ||X W^T||^2
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass
class WeightLocation:
    """A weight matrix that the model multiplies by, and the linears that are rows of it."""

    shape: tuple[int, ...]
    parts: list[tuple[int, Linear]] = field(default_factory=list)


def locate(parameters: Mapping[str, Any], floats: FloatView, linears: Sequence[Linear]) -> dict[int, WeightLocation]:
    """Find linears among filled parameters, by name or, if the model stacks or fuses them, by their values.

    Sets `weight`, and `seen` for those that were found.

    Args:
        parameters: name in the model -> parameter, of one layer or of what is outside the layers.
        floats: the float checkpoint.
        linears: those that belong there.

    Returns:
        Memory address -> the weight there.
    """
    import torch

    places: dict[int, WeightLocation] = {}
    matrices = [parameter for parameter in parameters.values() if parameter.ndim in (2, 3)]
    for linear in linears:
        parameter = parameters.get(f"{linear.name}.weight")
        if parameter is not None and tuple(parameter.shape) == floats.shape(f"{linear.name}.weight"):
            whole, start, linear.weight = parameter, 0, parameter
        else:
            values = np.require(floats.values(f"{linear.name}.weight"), requirements=["C", "W"])
            linear.weight = torch.from_numpy(values).to(matrices[0].device if matrices else "cpu")
            found_in = _search(linear.name, linear.weight, matrices)
            if found_in is None:
                continue
            whole, start = found_in
            linear.weight = whole[start : start + len(linear.weight)]
        linear.rows, linear.seen = len(linear.weight), True
        place = places.setdefault(whole.data_ptr(), WeightLocation(tuple(whole.shape)))
        place.parts.append((start, linear))
    return places


def _search(name: str, weight: Tensor, parameters: Sequence[Any]) -> tuple[Any, int] | None:
    """The model's matrix that contains `weight` as rows, and the first of these rows."""
    import torch

    expert = EXPERT.search(name)
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
        totals[EXPERT.sub(".experts.*.", linear.name)] += linear.tokens
    for linear in linears:
        linear.seen = linear.seen and totals[EXPERT.sub(".experts.*.", linear.name)] > 0
