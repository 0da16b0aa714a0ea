"""Which backend can do what: the choice of one, and the refusal of what none can do.

The facts are data, in capabilities.yaml. `backend: auto` takes the first one of conf/config.yaml's table for the method
that can do what the configuration asks for and knows the family of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.text import alternatives

_TABLE = Path(__file__).with_suffix(".yaml")
# Methods whose result depends on calibration text.
CALIBRATED = ("awq", "gptq", "autoround")


@dataclass(frozen=True)
class Requirements:
    """What a configuration asks of a backend.

    layers: `none`, `skip` or `widths`, the most that its rules by layer ask for.
    """

    method: str
    bits: int
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "none"
    rule_bits: tuple[int, ...] = ()
    rule_groups: tuple[int, ...] = ()
    lm_head: bool = False
    low_memory: bool = False
    dtype: str = "auto"


@cache
def table() -> dict[str, Any]:
    """capabilities.yaml."""
    import yaml

    content = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def toolchain_of(backend: str) -> str | None:
    """The environment that a backend runs in; None is this interpreter."""
    return None if backend == "none" else table()[backend]["toolchain"]


def bits_of(method: str, backends: Sequence[str]) -> tuple[int, ...]:
    """The bits that any of some backends has for a method."""
    return tuple(sorted({bits for name in backends for bits in _method(name, method).get("bits", ())}))


def group_sizes_of(method: str, backends: Sequence[str]) -> tuple[int, ...]:
    """The group sizes that any of some backends has for a method."""
    return tuple(sorted({size for name in backends for size in _method(name, method).get("group_size") or ()}))


def _method(backend: str, method: str) -> dict[str, Any]:
    return dict(table()[backend]["methods"].get(method) or {})


def able(backend: str, method: str) -> dict[str, Any]:
    """What a backend can do by a method: what holds for all of its methods, and what the method says otherwise."""
    return {**table()[backend], **_method(backend, method)}


def knows(backend: str, method: str, model_type: str) -> bool:
    """Whether a backend quantizes models of a type well by a method."""
    families = able(backend, method)["families"]
    return families is None or model_type in families


def faults(backend: str, requirements: Requirements) -> list[str]:
    """What a backend cannot do of a requirements, each with the option's name, its value, and what is allowed."""
    methods = table()[backend]["methods"]
    if requirements.method not in methods:
        others = [name for name, entry in table().items() if requirements.method in entry["methods"]]
        return [
            f"backend={backend}: does {alternatives(methods)}, {requirements.method} is done by {alternatives(others)}"
        ]
    known: dict[str, Any] = able(backend, requirements.method)
    found: list[str] = []
    asked = dict.fromkeys((requirements.bits, *requirements.rule_bits))
    found += [
        f"bits={bits}: {requirements.method} by {backend} takes {alternatives(known['bits'])}"
        for bits in asked
        if bits not in known["bits"]
    ]
    # Without groups (bitsandbytes at 8 bits) the size means nothing.
    sizes = known.get("group_size") if requirements.bits not in known.get("groupless_bits", ()) else None
    found += [
        f"group_size={size}: {requirements.method} by {backend} takes {alternatives(sizes)}"
        for size in dict.fromkeys((requirements.group_size, *requirements.rule_groups))
        if sizes and size not in sizes
    ]
    for key, allowed in known.get("options", {}).items():
        if key in requirements.options and requirements.options[key] not in allowed:
            shown = "null" if requirements.options[key] is None else str(requirements.options[key]).lower()
            found.append(f"method.{key}={shown}: {backend} takes {alternatives(allowed)}")
    if requirements.layers != "none" and known["layers"] == "none":
        found.append(f"layers: {backend} has no rules by layer; others have: {alternatives(_with('layers', 'skip'))}")
    elif requirements.layers == "widths" and known["layers"] != "widths":
        found.append(
            f"layers: {backend} has one width for all layers and can only skip some; "
            f"other bits or groups by layer have {alternatives(_with('layers', 'widths'))}"
        )
    if requirements.lm_head and not known["lm_head"]:
        found.append(
            f"lm_head=quantized: {backend} leaves it float; it is quantized by {alternatives(_with('lm_head'))}"
        )
    if requirements.low_memory and not known["low_memory"]:
        found.append(f"low_memory=true: {backend} holds the whole model; {alternatives(_with('low_memory'))} does not")
    if requirements.dtype not in known["dtypes"]:
        found.append(f"dtype={requirements.dtype}: {backend} computes in {alternatives(known['dtypes'])}")
    return found


def _with(key: str, value: str | None = None) -> list[str]:
    """The backends that have something by any of their methods."""
    wanted = (True,) if value is None else (value, "widths")
    return [
        name for name, entry in table().items()
        if any(able(name, method)[key] in wanted for method in entry["methods"])
    ]  # fmt: skip


def candidates(backend: str, order: Sequence[str], requirements: Requirements) -> list[str]:
    """The backends that may come to do it: the named one, or those of the order that have nothing against it."""
    names = list(order) if backend == "auto" else [backend]
    return [name for name in names if not faults(name, requirements)]


def choose(backend: str, order: Sequence[str], requirements: Requirements, model_type: str) -> tuple[str, list[str]]:
    """The backend for a model, and why those before it in the order were passed over.

    Raises:
        UserError: none can do it, with the reason of each.
    """
    passed: list[str] = []
    for name in list(order) if backend == "auto" else [backend]:
        reasons = faults(name, requirements)
        if requirements.method in table()[name]["methods"] and not knows(name, requirements.method, model_type):
            families = able(name, requirements.method)["families"]
            reasons = [*reasons, f"model_type={model_type}: {name} knows {', '.join(families)}"]
        if not reasons:
            return name, [f"{name} quantizes this model, since {reason}" for reason in passed]
        passed += reasons
    if backend != "auto":
        others = [
            name for name in order
            if name != backend and not faults(name, requirements) and knows(name, requirements.method, model_type)
        ]  # fmt: skip
        remedy = f"; give backend={others[0]}, or backend=auto" if others else ""
        raise UserError("; ".join(passed) + remedy)
    raise UserError(
        f"method={requirements.method}: no backend can do this: " + "; ".join(passed) + "; method=rtn takes any"
    )
