"""Chooses a width for each unit of linears: the least loss under a size, or the least size under a loss.

The loss of a plan is the sum of its units' losses. On the demo model this sum was within 10 % of the measured divergence of
the whole from 3 to 5.7 bits. The choice is an integer program, solved exactly by HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantline.core.errors import UserError
from quantline.core.text import binary_size

FLOAT_BITS = 16  # a unit that stays float
# Relative gap at which HiGHS stops: far below what a loss is known to.
_GAP = 1e-9
_MOST_TRIES = 100


@dataclass(frozen=True)
class Unit:
    """Linears that have one width.

    losses: nats per token by width. sizes: bytes by width, scales and zero points included. Both have the same widths.
    """

    name: str
    losses: Mapping[int, float]
    sizes: Mapping[int, int]


@dataclass(frozen=True)
class Allocation:
    """A width for each unit, with the sum of the losses, and the bytes of the whole model.

    uniform: the width that all units have; None if they differ.
    """

    widths: Mapping[str, int]
    loss: float
    size: int

    @property
    def uniform(self) -> int | None:
        """The one width of all units, None if they differ."""
        found = set(self.widths.values())
        return found.pop() if len(found) == 1 else None


def allocate(
    units: Sequence[Unit], *, fixed: int = 0, size_at_most: int | None = None, loss_at_most: float | None = None
) -> Allocation:
    """The best plan. Give one of the limits: the other quantity is minimized.

    Args:
        units: what to choose for.
        fixed: bytes of everything else: embeddings, output layer, norms, biases.
        size_at_most: bytes of the whole model.
        loss_at_most: sum of the losses, nats per token.

    Raises:
        UserError: no plan meets the limit; with what the nearest one needs.
        ValueError: not exactly one limit is given.
    """
    if (size_at_most is None) == (loss_at_most is None):
        raise ValueError("give size_at_most or loss_at_most")
    smallest = of_widths(
        units, {unit.name: min(unit.sizes, key=lambda bits: unit.sizes[bits]) for unit in units}, fixed
    )
    best = of_widths(units, {unit.name: min(unit.losses, key=lambda bits: unit.losses[bits]) for unit in units}, fixed)
    if size_at_most is not None and smallest.size > size_at_most:
        raise UserError(
            f"no plan is as small as {binary_size(size_at_most)}: the smallest takes {binary_size(smallest.size)}, of which "
            f"{binary_size(fixed)} are not quantized; give more, or narrower widths"
        )
    if loss_at_most is not None and best.loss > loss_at_most:
        raise UserError(
            f"no plan loses as little as {loss_at_most:.3g} nats a token: the best loses {best.loss:.3g}; give more, or "
            "wider widths"
        )
    return of_widths(units, _solved(units, fixed, size_at_most, loss_at_most), fixed)


def best_uniform(
    units: Sequence[Unit], *, fixed: int = 0, size_at_most: int | None = None, loss_at_most: float | None = None
) -> Allocation | None:
    """The best plan with one width for all units that meets the limits; None if there is none."""
    common = set.intersection(*(set(unit.losses) for unit in units))
    plans = [of_widths(units, dict.fromkeys((unit.name for unit in units), bits), fixed) for bits in sorted(common)]
    fits = [
        plan for plan in plans
        if (size_at_most is None or plan.size <= size_at_most) and (loss_at_most is None or plan.loss <= loss_at_most)
    ]  # fmt: skip
    if size_at_most is not None:
        return min(fits, key=lambda plan: (plan.loss, plan.size), default=None)
    return min(fits, key=lambda plan: (plan.size, plan.loss), default=None)


def of_widths(units: Sequence[Unit], widths: Mapping[str, int], fixed: int) -> Allocation:
    """A given plan with its loss and size."""
    loss = sum(unit.losses[widths[unit.name]] for unit in units)
    return Allocation(widths, loss, fixed + sum(unit.sizes[widths[unit.name]] for unit in units))


def _solved(units: Sequence[Unit], fixed: int, size_at_most: int | None, loss_at_most: float | None) -> dict[str, int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    # What alone breaks the limit is left out, so that the others are scaled by the limit and not by what nobody takes.
    choices = [
        (row, unit, bits) for row, unit in enumerate(units) for bits in unit.losses
        if loss_at_most is None or unit.losses[bits] <= loss_at_most
    ]  # fmt: skip
    loss = np.array([unit.losses[bits] for _, unit, bits in choices])
    size = np.array([unit.sizes[bits] for _, unit, bits in choices], dtype=float)
    rows = [row for row, _, _ in choices]
    one_each = coo_matrix((np.ones(len(choices)), (rows, range(len(choices)))), shape=(len(units), len(choices)))
    # Both quantities are scaled to about 1, because HiGHS allows absolute faults of 1e-6.
    scale = max(size.max(), 1.0), max(np.abs(loss).max(), 1e-300)
    if size_at_most is not None:
        aim, limited, limit = loss / scale[1], size / scale[0], (size_at_most - fixed) / scale[0]
    else:
        assert loss_at_most is not None
        aim, limited, limit = size / scale[0], loss / scale[1], loss_at_most / scale[1]
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(limited[None], -np.inf, limit)]
    for _ in range(_MOST_TRIES):
        found = milp(
            aim, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), options={"mip_rel_gap": _GAP},
            constraints=constraints,
        )  # fmt: skip
        if found.x is None:
            break
        taken = found.x > 0.5
        widths = {unit.name: bits for (_, unit, bits), one in zip(choices, taken, strict=True) if one}
        plan = of_widths(units, widths, fixed)
        if plan.size <= (size_at_most or np.inf) and plan.loss <= (np.inf if loss_at_most is None else loss_at_most):
            return widths
        # Beyond the limit by less than HiGHS sees: this plan is not allowed again.
        constraints.append(LinearConstraint(taken[None].astype(float), -np.inf, len(units) - 1))
    raise RuntimeError(f"the integer program has no solution: {found.message}")
