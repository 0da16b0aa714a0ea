"""Recommend a variant: of those that serve and fit, the one that loses least or the smallest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from quantline.planning.nearest import overrides
from quantline.planning.preflight import check
from quantline.planning.spec import FLOAT, Finding, Machine, Model, Plan, VariantSpec

TIERS = ("float", "8 bits", "4 bits", "3 bits", "2 bits")
# The order of the tiers. Critical use prefers 8 bits, which halves the memory and loses next to nothing, and never goes
# below 4. Other use prefers 4 bits, and goes below only if nothing else fits.
_CRITICAL = (1, 0, 2)
_ORDINARY = (2, 1, 0, 3, 4)


@dataclass(frozen=True)
class Choice:
    """One candidate. loss: published; measured: by this project on this model, or empty. why: the reason for its rank."""

    overrides: str
    tier: int
    plan: Plan
    loss: str
    measured: str
    why: str

    @property
    def works(self) -> bool:
        """Whether it passes all checks."""
        return self.plan.passes()

    @property
    def against(self) -> list[Finding]:
        """The reasons against it."""
        return self.plan.refused


@dataclass(frozen=True)
class Suggestion:
    """Candidates in order of preference, those that work first. The first one is recommended if it works."""

    choices: tuple[Choice, ...]
    critical: bool

    @property
    def best(self) -> Choice | None:
        """The recommended one."""
        first = self.choices[0] if self.choices else None
        return first if first is not None and first.works else None


@cache
def candidates() -> tuple[dict[str, Any], ...]:
    """The candidates of recommend.yaml."""
    text = resources.files("quantline.planning").joinpath("recommend.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))


def suggest(
    asked: VariantSpec,
    model: Model,
    machine: Machine,
    *,
    critical: bool,
    defaults: Mapping[str, Mapping[str, Any]],
    measured: Mapping[tuple[str, int, int], str] | None = None,
) -> Suggestion:
    """Rank the candidates for a model, a server and its memory.

    Args:
        asked: the variant whose serving options apply to all candidates.
        model, machine: see `preflight.check`.
        critical: prefer quality to size.
        defaults: the options of each method.
        measured: measured losses of this model's variants, by method, bits and group size.
    """
    order = _CRITICAL if critical else _ORDINARY
    choices = []
    for entry in candidates():
        if entry["method"] != FLOAT and entry["method"] not in defaults:
            continue
        plan = _best_groups(_variant(entry, asked, defaults), model, machine)
        variant = plan.planned
        known = (measured or {}).get((variant.method, variant.bits, variant.group_size), "")
        why = _why(entry["tier"], critical)
        choices.append(Choice(overrides(variant, asked, defaults), entry["tier"], plan, entry["loss"], known, why))

    def preference(choice: Choice) -> tuple[bool, int]:
        return not choice.works or choice.tier not in order, (*order, *range(5)).index(choice.tier)

    return Suggestion(tuple(sorted(choices, key=preference)), critical)


def _best_groups(variant: VariantSpec, model: Model, machine: Machine) -> Plan:
    """The candidate as it is, or with the first smaller group size that divides the widths (and each GPU's share)."""
    plan = check(variant, model, machine)
    if variant.method in (FLOAT, "bnb") or variant.group_size == -1:
        return plan
    for size in (64, 32, -1):
        if plan.passes("quantize", "convert", "serve"):
            break
        other = check(replace(variant, group_size=size), model, machine)
        plan = other if other.passes("quantize", "convert", "serve") else plan
    return plan


def _variant(entry: Mapping[str, Any], asked: VariantSpec, defaults: Mapping[str, Mapping[str, Any]]) -> VariantSpec:
    method = str(entry["method"])
    common = VariantSpec(
        method=method, serve_dtype=asked.serve_dtype, tensor_parallel_size=asked.tensor_parallel_size,
        low_memory=asked.low_memory,
    )  # fmt: skip
    if method == FLOAT:
        return replace(common, low_memory=False)
    options = {**defaults[method], **entry.get("options", {})}
    return replace(common, bits=int(entry["bits"]), group_size=int(entry["group_size"]), options=options)


def _why(tier: int, critical: bool) -> str:
    if tier == 0:
        return "loses nothing and saves nothing"
    if tier == 1:
        return "half the memory, with next to no loss" if critical else "loses less than 4 bits, at twice the size"
    if tier == 2:
        return (
            "a quarter of the memory; for critical use where 8 bits do not work"
            if critical
            else "small, with little loss"
        )
    return "not for critical use" if critical else "only where nothing larger fits"
