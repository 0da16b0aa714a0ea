"""The candidates of a search: each method with each width, and with plans by budget between them; and what does not work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from quantline.core.errors import UserError
from quantline.planning.budget import SERVED, Limit, budget
from quantline.planning.preflight import check
from quantline.planning.search import Candidate
from quantline.planning.spec import Machine, Model, Step, VariantSpec


@dataclass(frozen=True)
class Space:
    """Candidates, the variant of each, and why others are not among them."""

    candidates: list[Candidate] = field(default_factory=list)
    variants: dict[str, VariantSpec] = field(default_factory=dict)
    pruned: dict[str, str] = field(default_factory=dict)


def space(
    variant: VariantSpec, model: Model, machine: Machine, methods: Mapping[str, Mapping[str, Any]],
    losses: Mapping[tuple[str, int], float], *, budgeted: Sequence[str], step: float, steps: Sequence[Step] = SERVED,
) -> Space:  # fmt: skip
    """Everything that a search may choose from.

    Args:
        variant: what all have: group size, backend and so on.
        model, machine: the float model, and what serves it.
        methods: options of each method.
        losses: nats per token of each unit by width.
        budgeted: methods whose layers may have different widths.
        step: bits between two plans by budget.
        steps: what a candidate has to pass.
    """
    found = Space()
    measured = sorted({bits for _, bits in losses})
    for method, options in methods.items():
        own = replace(variant, method=method, options=options, rules=())
        works = []
        for bits in measured:
            plan = check(replace(own, bits=bits), model, machine)
            name = f"{method}-w{bits}"
            if not plan.passes(*steps):
                found.pruned[name] = "; ".join(one.reason for one in plan.refused if one.step in steps)
                continue
            if plan.planned.bits != bits:
                found.pruned[name] = f"{method} has {plan.planned.bits} bits by itself"
                continue
            assert plan.weights is not None
            works.append(bits)
            loss = sum(kl for (_, width), kl in losses.items() if width == bits)
            _add(found, name, replace(own, bits=bits), plan.weights.total, loss)
        if method in budgeted and works:
            for level in _levels(works, step):
                name = f"{method}-{level:g}"
                try:
                    made = budget(own, model, machine, losses, Limit(bits=level), steps=steps)
                except UserError as error:
                    found.pruned[name] = str(error)
                    continue
                if made.taken == "mixed" and made.variant not in found.variants.values():
                    assert made.plan.weights is not None
                    _add(found, name, made.variant, made.plan.weights.total, made.allocation.loss)
    return found


def _levels(works: Sequence[int], step: float) -> list[float]:
    """Bits a weight, from the narrowest width that works to the widest, or to 8 where there is only one."""
    return [round(float(bits), 4) for bits in np.arange(min(works) + step, max(8, *works) + step, step)]


def _add(found: Space, name: str, variant: VariantSpec, size: int, loss: float) -> None:
    found.variants[name] = variant
    found.candidates.append(Candidate(name, tuple(overrides_of(variant)), size, loss, variant.method))


def overrides_of(variant: VariantSpec) -> list[str]:
    """The overrides of what a search chooses: method, bits and rules."""
    rules = ", ".join(_rule(rule) for rule in variant.rules)
    return [
        f"method={variant.method}", f"bits={variant.bits}", *([f"layers.rules=[{rules}]"] if rules else []),
    ]  # fmt: skip


def _rule(rule: Mapping[str, Any]) -> str:
    kept = "skip: true" if rule.get("skip") else f"bits: {rule['bits']}"
    return f'{{match: "{rule["match"]}", {kept}}}'
