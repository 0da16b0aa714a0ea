"""What each backend can do: chooses a backend, and refuses what none can do.

The facts are data, in capabilities.yaml. `backend: auto` takes the method's list of backends in conf/config.yaml, and from
it the first one that meets the configuration's requirements and supports the model's family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.choice import fixed_inputs, rounds_inputs
from quantline.checkpoints.model_config import dimensions
from quantline.core.errors import UserError
from quantline.core.text import alternatives

_TABLE = Path(__file__).with_suffix(".yaml")
# Methods whose result depends on calibration data.
CALIBRATED = ("awq", "gptq", "autoround", "gguf")


def calibrated(method: str, options: Mapping[str, Any]) -> bool:
    """Whether a method with these options needs calibration data."""
    if not options.get("imatrix", True):
        return False
    return method in CALIBRATED or fixed_inputs(method, options)


@dataclass(frozen=True)
class Requirements:
    """What a configuration requires of a backend.

    layers: what its rules by layer require: `none`, `skip` (some linears stay float) or `widths` (other bits or groups).
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
    gpus: int = 1


@cache
def table() -> dict[str, Any]:
    """capabilities.yaml."""
    import yaml

    content = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def toolchain_of(backend: str) -> str | None:
    """The environment that a backend runs in; None means this interpreter."""
    return None if backend == "none" else table()[backend]["toolchain"]


def server_of(backend: str) -> str | None:
    """The environment that serves what a backend writes; None for the usual one."""
    return None if backend == "none" else table()[backend].get("server")


def bits_of(method: str, backends: Sequence[str]) -> tuple[int, ...]:
    """The bits that at least one of `backends` supports for a method."""
    return tuple(sorted({bits for name in backends for bits in _method(name, method).get("bits", ())}))


def group_sizes_of(method: str, backends: Sequence[str]) -> tuple[int, ...]:
    """The group sizes that at least one of `backends` supports for a method."""
    return tuple(sorted({size for name in backends for size in _method(name, method).get("group_size") or ()}))


def _method(backend: str, method: str) -> dict[str, Any]:
    return dict(table()[backend]["methods"].get(method) or {})


def able(backend: str, method: str) -> dict[str, Any]:
    """What a backend can do with a method: the backend's entry, overridden by the method's."""
    return {**table()[backend], **_method(backend, method)}


def family_faults(backend: str, requirements: Requirements, config: Mapping[str, Any]) -> list[str]:
    """Why a backend that meets the requirements does not quantize a model well.

    config: the model's config.json.
    """
    kind, families = str(config.get("model_type")), able(backend, requirements.method)["families"]
    if families is not None and kind not in families:
        return [f"model_type={kind}: {backend} supports {', '.join(families)}"]
    numbers = dimensions(config)
    facts = {"grouped_heads": numbers.kv_heads != numbers.heads}
    return [
        f"model_type={kind}: {backend} cannot quantize it{given}: {reason}"
        for families, given, reason in _exceptions(backend, requirements, facts) if kind in families
    ]  # fmt: skip


def _exceptions(
    backend: str, requirements: Requirements, facts: Mapping[str, Any]
) -> Iterator[tuple[Sequence[str], str, str]]:
    """The exceptions whose conditions are met: families (none: for all), the conditions in words, and the reason."""
    sizes = (requirements.group_size, *requirements.rule_groups)
    inputs = "rounded" if rounds_inputs(requirements.method, requirements.options) else "float"
    known = {**requirements.options, "grouped": any(size != -1 for size in sizes), "inputs": inputs, **facts}
    for entry in table()[backend].get("exceptions", ()):
        conditions = entry.get("when", {})
        if all(known.get(key) == value for key, value in conditions.items()):
            given = " ".join(f"{key}={str(value).lower()}" for key, value in conditions.items())
            yield entry.get("families", ()), f" with {given}" if given else "", entry["reason"]


@cache
def claimed_families() -> frozenset[str]:
    """The model types that a backend names as its own, with any method."""
    named = [able(backend, method)["families"] for backend, entry in table().items() for method in entry["methods"]]
    return frozenset(family for families in named for family in families or ())


def groupless(backend: str, method: str, bits: int) -> bool:
    """Whether this width has no groups, so that the group size is ignored (bitsandbytes at 8 bits)."""
    return backend in table() and bits in able(backend, method).get("groupless_bits", ())


def faults(backend: str, requirements: Requirements) -> list[str]:
    """The requirements that a backend does not meet, each with the option's name, its value, and what is allowed."""
    methods = table()[backend]["methods"]
    if requirements.method not in methods:
        others = [name for name, entry in table().items() if requirements.method in entry["methods"]]
        return [
            f"backend={backend}: has {alternatives(methods)}; {requirements.method} is supported by {alternatives(others)}"
        ]
    known: dict[str, Any] = able(backend, requirements.method)
    found: list[str] = []
    all_bits = dict.fromkeys((requirements.bits, *requirements.rule_bits))
    found += [
        f"bits={bits}: {requirements.method} by {backend} takes {alternatives(known['bits'])}"
        for bits in all_bits
        if bits not in known["bits"]
    ]
    ignored = groupless(backend, requirements.method, requirements.bits)
    sizes = None if ignored else known.get("group_size")
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
        found.append(f"layers: {backend} has no rules by layer; {alternatives(_with('layers', 'skip'))} can have them")
    elif requirements.layers == "widths" and known["layers"] != "widths":
        found.append(
            f"layers: {backend} uses the same bits and group size for all layers and can only skip some; "
            f"{alternatives(_with('layers', 'widths'))} can set them by layer"
        )
    if requirements.lm_head and not known["lm_head"]:
        found.append(f"lm_head=quantized: {backend} leaves it float; {alternatives(_with('lm_head'))} can quantize it")
    if requirements.low_memory and not known["low_memory"]:
        found.append(
            f"low_memory=true: {backend} holds the whole model; {alternatives(_with('low_memory'))} can hold one layer"
        )
    if requirements.gpus > 1 and not known["several_gpus"]:
        found.append(
            f"quantize.gpus={requirements.gpus}: {requirements.method} by {backend} takes 1; "
            f"{alternatives(_on_several_gpus())} takes several"
        )
    if requirements.dtype not in known["dtypes"]:
        found.append(f"dtype={requirements.dtype}: {backend} computes in {alternatives(known['dtypes'])}")
    found += [
        f"{backend} cannot do this{given}: {reason}"
        for families, given, reason in _exceptions(backend, requirements, {}) if not families
    ]  # fmt: skip
    return found


def _with(key: str, value: str | None = None) -> list[str]:
    """The backends that have a capability with at least one of their methods."""
    wanted = (True,) if value is None else (value, "widths")
    return [
        name for name, entry in table().items()
        if any(able(name, method)[key] in wanted for method in entry["methods"])
    ]  # fmt: skip


def _on_several_gpus() -> list[str]:
    return [
        f"{method} by {name}" for name, entry in table().items() for method in entry["methods"]
        if able(name, method)["several_gpus"]
    ]  # fmt: skip


def candidates(backend: str, order: Sequence[str], requirements: Requirements) -> list[str]:
    """The backends that meet the requirements: the named one, or those in `order`."""
    names = list(order) if backend == "auto" else [backend]
    return [name for name in names if not faults(name, requirements)]


def choose(
    backend: str, order: Sequence[str], requirements: Requirements, config: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The backend for a model, given by its config.json, and why each one before it in the order was passed over.

    Raises:
        UserError: no backend can do it; with the reason for each.
    """

    def against(name: str) -> list[str]:
        known = requirements.method in table()[name]["methods"]
        return faults(name, requirements) + (family_faults(name, requirements, config) if known else [])

    passed: list[str] = []
    for name in list(order) if backend == "auto" else [backend]:
        reasons = against(name)
        if not reasons:
            return name, [f"{name} quantizes this model, because {reason}" for reason in passed]
        passed += reasons
    if backend != "auto":
        others = [name for name in order if name != backend and not against(name)]
        remedy = f"; give backend={others[0]}, or backend=auto" if others else ""
        raise UserError("; ".join(passed) + remedy)
    plain = replace(requirements, method="rtn", options={})
    able_to = not faults("native", plain) and not family_faults("native", plain, config)
    remedy = "; method=rtn takes this model" if requirements.method != "rtn" and able_to else ""
    raise UserError(f"method={requirements.method}: no backend can do this: {'; '.join(passed)}{remedy}")
