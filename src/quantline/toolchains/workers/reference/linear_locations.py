"""Locates a checkpoint's linears in a model that may stack or fuse them, and marks those whose calls cannot be observed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.toolchains.workers.reference.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(eq=False)
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
    held: float = 0.0  # the errors and the energy on what was held back
    rounded: float = 0.0  # as `held`, with the weights rounded to nearest in the same grid
    held_energy: float = 0.0
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass
class WeightLocation:
    """A weight matrix that the model multiplies by, and the linears that are rows of it."""

    shape: tuple[int, ...]
    parts: list[tuple[int, Linear]] = field(default_factory=list)


def locate(
    part: str, skeleton: Skeleton, linears: Sequence[Linear], homes: Mapping[str, Mapping[str, str]]
) -> dict[int, WeightLocation]:
    """Find linears in a filled part of the float model; those that the model stacks or fuses by their values.

    Sets `weight`, and `seen` for those that were found.

    Args:
        part: a part, or the rest of the model.
        skeleton: the float model.
        linears: those that belong there.
        homes: linear -> part -> the parameter that is its weight, see `Skeleton.homes`.

    Returns:
        Memory address -> the weight there.
    """
    import torch

    places: dict[int, WeightLocation] = {}
    matrices = [parameter for parameter in skeleton.parameters_of(part).values() if parameter.ndim in (2, 3)]
    for linear in linears:
        if part in homes[linear.name]:
            whole = linear.weight = skeleton.parameter(homes[linear.name][part])
            start = 0
        else:
            values = np.require(skeleton.view.values(f"{linear.name}.weight"), requirements=["C", "W"])
            linear.weight = torch.from_numpy(values).to(skeleton.device)
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
