"""A variant whose layers get their widths from a budget: measured losses of units, the server's rules, exact sizes.

The widths are those that the method, its backend and the target take, and float. What a server fuses has one width. The
answer is an ordinary variant: bits, and rules by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantline.checkpoints.layouts import LAYOUTS, Storage
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import select_linears
from quantline.core.errors import UserError
from quantline.planning.allocation import FLOAT_BITS, Allocation, Unit, allocate, best_uniform
from quantline.planning.layouts import is_symmetric
from quantline.planning.preflight import check
from quantline.planning.spec import Machine, Model, Plan, Step, VariantSpec
from quantline.serving.checkpoint_facts import units_of

# A plan has to be better than one width by more than this share of its loss, which is how far sums of single units' losses
# were off the whole.
WORTH = 0.1
GB = 10**9


@dataclass(frozen=True)
class Limit:
    """What a plan has to meet: one of them. bits: a weight of the quantized linears, scales and zero points included."""

    bits: float | None = None
    gigabytes: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Budget:
    """The answer.

    variant: with its bits and rules. allocation: the plan of the units. uniform: the best plan with one width within the
    same limit, None if there is none. taken: "mixed", or "uniform" where the plan is not better by more than `WORTH`. plan:
    the preflight of the variant. bits: a weight of the units, as `Limit.bits`. widths: those that there were to choose from.
    """

    variant: VariantSpec
    allocation: Allocation
    uniform: Allocation | None
    taken: str
    plan: Plan
    bits: float
    widths: tuple[int, ...]


SERVED: tuple[Step, ...] = ("quantize", "convert", "serve")


def working_widths(
    variant: VariantSpec, model: Model, machine: Machine, measured: Sequence[int], steps: Sequence[Step] = SERVED
) -> dict[int, Plan]:
    """The widths among those measured with which the variant passes these steps, with their plans."""
    plans = {bits: check(replace(variant, bits=bits, rules=()), model, machine) for bits in sorted(measured)}
    return {bits: plan for bits, plan in plans.items() if plan.passes(*steps)}


def budget(
    variant: VariantSpec, model: Model, machine: Machine, losses: Mapping[tuple[str, int], float], limit: Limit,
    *, steps: Sequence[Step] = SERVED,
) -> Budget:  # fmt: skip
    """The best variant within a limit.

    Args:
        variant: method, group size, backend and so on; its bits and rules are chosen.
        model, machine: the float model and the machine that serves it.
        losses: nats per token by unit and width.
        limit: what to meet.
        steps: what it has to pass.

    Raises:
        UserError: no width works, no plan meets the limit, or the plan is refused.
    """
    measured = sorted({bits for _, bits in losses})
    plans = working_widths(variant, model, machine, measured, steps)
    if not plans:
        raise UserError(
            f"method={variant.method} group_size={variant.group_size}: none of the widths {', '.join(map(str, measured))} "
            "works from quantizing to serving; `python -m stages.plan` says why"
        )
    units = units_of_model(variant, model, losses, plans)
    whole = next(iter(plans.values()))
    assert whole.weights is not None, "a plan that passes has sizes"
    fixed, values = whole.weights.left_float, whole.weights.quantized_parameters
    size = None
    if limit.bits is not None:
        size = fixed + int(limit.bits * values / 8)
    elif limit.gigabytes is not None:
        size = int(limit.gigabytes * GB)
    found = allocate(units, fixed=fixed, size_at_most=size, loss_at_most=limit.loss)
    plain = best_uniform(units, fixed=fixed, size_at_most=size, loss_at_most=limit.loss)
    chosen, taken = found, "mixed"
    if plain is not None and not _worth(found, plain, by_size=size is not None):
        chosen, taken = plain, "uniform"
    made = composed(variant, chosen, model)
    plan = check(made, model, machine)
    if not plan.passes(*steps):
        raise UserError("the plan is refused: " + "; ".join(finding.reason for finding in plan.refused))
    return Budget(made, chosen, plain, taken, plan, 8 * (chosen.size - fixed) / values, (*plans, FLOAT_BITS))


def _worth(found: Allocation, plain: Allocation, *, by_size: bool) -> bool:
    if by_size:
        return found.loss < plain.loss * (1 - WORTH)
    return found.size < plain.size


def units_of_model(
    variant: VariantSpec, model: Model, losses: Mapping[tuple[str, int], float], plans: Mapping[int, Plan]
) -> list[Unit]:
    """The units of a model with their losses and sizes at each width, and in float.

    Raises:
        UserError: a unit has no measured loss.
    """
    widest = max(plans)
    linears = select_linears(
        model.checkpoint, model.config, bits=widest, group_size=variant.group_size, lm_head=variant.lm_head
    )
    storage = Storage(
        zero_points=not is_symmetric(variant.method, variant.options),
        double_quant=bool(variant.options.get("double_quant", True)),
    )
    found = []
    for unit, names in units_of(linears).items():
        if missing := [bits for bits in plans if (unit, bits) not in losses]:
            raise UserError(f"{unit}: its loss at {missing[0]} bits was not measured; run stages.sensitivity again")
        sizes = {
            bits: sum(
                LAYOUTS[plan.layout].bytes_of(model.shapes[name], LinearSpec(bits, variant.group_size), storage).total
                for name in names
            )
            for bits, plan in plans.items()
        }
        sizes[FLOAT_BITS] = sum(2 * model.shapes[name][0] * model.shapes[name][1] for name in names)
        found.append(Unit(unit, {**{bits: losses[unit, bits] for bits in plans}, FLOAT_BITS: 0.0}, sizes))
    return found


def composed(variant: VariantSpec, plan: Allocation, model: Model) -> VariantSpec:
    """The variant of a plan: the width of most units is its bits, the others get rules.

    Raises:
        UserError: everything stays float.
    """
    counts = Counter(bits for bits in plan.widths.values() if bits != FLOAT_BITS)
    if not counts:
        raise UserError("the limit leaves every linear in float; the float model meets it, or give a larger loss")
    usual = counts.most_common(1)[0][0]
    rules: list[dict[str, Any]] = []
    for unit, bits in plan.widths.items():
        if bits == usual:
            continue
        kept: dict[str, Any] = {"skip": True} if bits == FLOAT_BITS else {"bits": bits}
        rules += [{"match": match, **kept} for match in patterns(unit)]
    return replace(variant, bits=usual, rules=tuple(rules))


def patterns(unit: str) -> list[str]:
    """The patterns of `layers.rules` for the linears of a unit, by its name."""
    parent, _, last = unit.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in last.split("+")]
