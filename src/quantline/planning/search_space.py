"""The candidates of a search, and what does not work.

Each method has its widths, and plans by budget between them; at each group size that is asked for; with the first kind of KV
cache that fits. GGUF has llama.cpp's types in the place of widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from quantline.checkpoints.layouts.choice import own_width
from quantline.checkpoints.layouts.gguf.planned import METHOD as GGUF
from quantline.core.errors import UserError
from quantline.planning.budget import SERVED, Limit, budget
from quantline.planning.preflight import check
from quantline.planning.search import Candidate
from quantline.planning.spec import Machine, Model, Plan, Step, VariantSpec

# nats per token of each unit by width
Losses = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Space:
    """Candidates, the variant of each, and why others are not among them."""

    candidates: list[Candidate] = field(default_factory=list)
    variants: dict[str, VariantSpec] = field(default_factory=dict)
    pruned: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Axes:
    """What a search may choose from.

    methods: options of each method. losses: by group size. named_groups: a candidate's overrides name its group size.
    caches: the machine with each `serve.kv_cache_dtype`, in the order in which they are tried; overrides name all but the
    first. types: of GGUF. budgeted: methods whose layers may have different widths. step: bits between two plans by budget.
    steps: what a candidate has to pass.
    """

    methods: Mapping[str, Mapping[str, Any]]
    losses: Mapping[int, Losses]
    caches: Mapping[str, Machine]
    budgeted: Sequence[str]
    step: float
    types: Sequence[str] = ()
    steps: Sequence[Step] = SERVED
    named_groups: bool = False


def space(variant: VariantSpec, model: Model, axes: Axes) -> Space:
    """Everything that a search may choose from. variant: what all have: backend, output layer and so on."""
    found = Space()
    for method, options in axes.methods.items():
        if method == GGUF:
            _types(found, replace(variant, method=method, options=options, rules=()), model, axes)
            continue
        width = own_width(method, options)
        for group, losses in [*axes.losses.items()][: 1 if width else None]:
            own = replace(variant, method=method, options=options, rules=(), group_size=group)
            tail = f"-g{group}" if axes.named_groups and width is None else ""
            works = []
            for bits in sorted({bits for _, bits in losses}):
                name = f"{method}-w{bits}{tail}"
                if width is not None and width.bits != bits:
                    found.pruned[name] = f"{method} has {width.bits} bits by itself"
                elif _add(found, name, replace(own, bits=bits), model, axes=axes, loss=_sum(losses, bits)):
                    works.append(bits)
            if method in axes.budgeted and works:
                _plans(found, own, model, axes=axes, losses=losses, levels=_levels(works, axes.step))
    return found


def _plans(
    found: Space, own: VariantSpec, model: Model, *, axes: Axes, losses: Losses, levels: Sequence[float]
) -> None:  # fmt: skip
    # Whether it fits is asked of each plan, with each kind of cache.
    machine = replace(next(iter(axes.caches.values())), memory_bytes=None)
    steps = [step for step in axes.steps if step != "memory"]
    for level in levels:
        name = f"{own.method}-{level:g}{f'-g{own.group_size}' if axes.named_groups else ''}"
        try:
            made = budget(own, model, machine, losses, Limit(bits=level), steps=steps)
        except UserError as error:
            found.pruned[name] = str(error)
            continue
        if made.taken == "mixed" and made.variant not in found.variants.values():
            _add(found, name, made.variant, model, axes=axes, loss=made.allocation.loss)


def _types(found: Space, variant: VariantSpec, model: Model, axes: Axes) -> None:
    """GGUF's mixtures. The loss is that of rounding to as many bits, scales included, between the measured widths."""
    group, losses = next(iter(axes.losses.items()))
    widths = sorted({bits for _, bits in losses})
    scales = 16 / group if group > 0 else 0.0
    known = [math.log(max(_sum(losses, bits), 1e-9)) for bits in widths]
    for kind in axes.types:
        one = replace(variant, options={**variant.options, "type": kind})
        plan = check(one, model, next(iter(axes.caches.values())))
        bits = plan.weights.bits_per_quantized_weight if plan.weights else 0.0
        loss = math.exp(float(np.interp(bits, [width + scales for width in widths], known)))
        _add(found, f"{GGUF}-{kind}", one, model, axes=axes, loss=loss)


def _sum(losses: Losses, bits: int) -> float:
    return sum(kl for (_, width), kl in losses.items() if width == bits)


def _levels(works: Sequence[int], step: float) -> list[float]:
    """Bits a weight, from the narrowest width that works to the widest, or to 8 where there is only one."""
    return [round(float(bits), 4) for bits in np.arange(min(works) + step, max(8, *works) + step, step)]


def _add(found: Space, name: str, variant: VariantSpec, model: Model, *, axes: Axes, loss: float) -> bool:
    """Add a candidate with the first kind of cache with which it passes; False if there is none, and why is noted."""
    chosen: Plan | None = None
    usual = next(iter(axes.caches))
    for cache, machine in axes.caches.items():
        shown = name if cache == usual else f"{name}-kv-{cache}"
        if chosen is not None:
            found.pruned[shown] = f"{name} fits with the KV cache that is tried before it"
            continue
        plan = check(variant, model, machine)
        if not plan.passes(*axes.steps):
            found.pruned[shown] = "; ".join(one.reason for one in plan.refused if one.step in axes.steps)
            continue
        chosen = plan
        assert plan.weights is not None
        grouped = axes.named_groups and own_width(variant.method, variant.options) is None
        more = [f"group_size={variant.group_size}"] if grouped else []
        more += [] if cache == usual else [f"serve.kv_cache_dtype={cache}"]
        found.variants[shown] = variant
        overrides = (*overrides_of(variant), *more)
        found.candidates.append(Candidate(shown, overrides, plan.weights.total, loss, variant.method))
    return chosen is not None


def overrides_of(variant: VariantSpec) -> list[str]:
    """The overrides of what a search chooses: method, bits and rules; of GGUF the type."""
    if variant.method == GGUF:
        return [f"method={GGUF}", f"method.type={variant.options['type']}"]
    rules = ", ".join(_rule(rule) for rule in variant.rules)
    return [
        f"method={variant.method}", f"bits={variant.bits}", *([f"layers.rules=[{rules}]"] if rules else []),
    ]  # fmt: skip


def _rule(rule: Mapping[str, Any]) -> str:
    kept = "skip: true" if rule.get("skip") else f"bits: {rule['bits']}"
    return f'{{match: "{rule["match"]}", {kept}}}'
