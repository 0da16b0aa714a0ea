"""What a configuration requires of a backend, and which faults can be found without the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantline.checkpoints.layouts.choice import own_width
from quantline.core.text import alternatives
from quantline.quantization import capabilities


def with_own_widths(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain values with the bits and group size of a method that has them by itself (fp8, gguf, ...), whatever is given."""
    method = values.get("method")
    try:
        width = own_width(str(method.get("name")), method) if isinstance(method, Mapping) else None
    except KeyError:  # a type that does not exist, which is reported elsewhere
        width = None
    return values if width is None else {**values, "bits": width.bits, "group_size": width.group_size}


def requirements_of(values: Mapping[str, Any]) -> capabilities.Requirements:
    """What a configuration, given as plain values, requires of a backend."""
    values = with_own_widths(values)
    method = values["method"]
    rules = values.get("layers", {}).get("rules") or []
    bits = tuple(rule["bits"] for rule in rules if rule.get("bits") is not None)
    groups = tuple(rule["group_size"] for rule in rules if rule.get("group_size") is not None)
    return capabilities.Requirements(
        method=method["name"], bits=values["bits"], group_size=values["group_size"],
        options={key: value for key, value in method.items() if key != "name"},
        layers="widths" if bits or groups else "skip" if rules else "none", rule_bits=bits, rule_groups=groups,
        lm_head=values["lm_head"] == "quantized", low_memory=values["low_memory"], dtype=values["dtype"],
        gpus=int((values.get("quantize") or {}).get("gpus", 1)),
    )  # fmt: skip


def method_faults(values: Mapping[str, Any]) -> list[str]:
    """What no backend, or not the named one, can do. `values` is a configuration as plain values, perhaps an invalid one."""
    # The values may be anything. Invalid types are already reported elsewhere.
    try:
        requirements, backends, backend = requirements_of(values), dict(values["backends"]), str(values["backend"])
    except (KeyError, TypeError, AttributeError):
        return []
    if (
        requirements.method not in backends
        or not isinstance(requirements.bits, int)
        or not isinstance(requirements.group_size, int)
    ):
        return []
    order = backends[requirements.method]
    unknown = [name for names in backends.values() for name in names if name not in capabilities.table()]
    if unknown:
        return [f"backends: {unknown[0]} is not a backend; allowed are {', '.join(capabilities.table())}"]
    if requirements.options.get("activation_bits") and (alike := _activation_faults(requirements)):
        return alike
    if backend != "auto":
        return capabilities.faults(backend, requirements) if backend in capabilities.table() else []
    if capabilities.candidates("auto", order, requirements):
        return []
    faults = _bits_faults(requirements, backends) + _group_faults(requirements, order)
    if not faults:
        tried = (fault for name in order for fault in capabilities.faults(name, requirements))
        faults = list(dict.fromkeys(tried)) or [f"backends.{requirements.method}: is empty; name a backend"]
    return faults


def _activation_faults(requirements: capabilities.Requirements) -> list[str]:
    """What cannot be combined with rounded activations.

    Their layouts have symmetric weights of 4 bits, or, for int8 activations, of 8 bits with one scale per channel.
    """
    rounded = requirements.options["activation_bits"]
    four = requirements.bits == 4
    wanted = [
        f"{key}={shown}" for key, shown, matches in (
            ("bits", "4" if rounded == "fp8" else "8", four or (rounded == 8 and requirements.bits == 8)),
            ("group_size", "-1", four or rounded == "fp8" or requirements.group_size == -1),
            ("method.sym", "true", requirements.options.get("sym", True)),
            ("layers", "uniform", requirements.layers != "widths"),
        ) if not matches
    ]  # fmt: skip
    weights = "symmetric weights of 4 bits" + (", or of 8 bits with one scale per channel" if rounded == 8 else "")
    return [f"method.activation_bits={rounded}: needs {weights}; give {' '.join(wanted)}"] if wanted else []


def _bits_faults(requirements: capabilities.Requirements, backends: Mapping[str, list[str]]) -> list[str]:
    allowed = {method: capabilities.bits_of(method, names) for method, names in backends.items()}
    faults = []
    for bits in dict.fromkeys((requirements.bits, *requirements.rule_bits)):
        if bits in allowed[requirements.method]:
            continue
        others = [method for method, widths in allowed.items() if bits in widths]
        remedy = f"; method={others[0]} takes bits={bits}" if others else ""
        if not others and len(allowed[requirements.method]) == 1:
            wider = next(method for method, widths in allowed.items() if len(widths) > 1)
            remedy = f"; method={wider} takes {alternatives(allowed[wider])}"
        faults.append(f"bits={bits}: {requirements.method} takes {alternatives(allowed[requirements.method])}{remedy}")
    return faults


def _group_faults(requirements: capabilities.Requirements, order: list[str]) -> list[str]:
    allowed = capabilities.group_sizes_of(requirements.method, order)
    faults = []
    for size in dict.fromkeys((requirements.group_size, *requirements.rule_groups)):
        if allowed and size not in allowed:
            near = min((one for one in allowed if one > 0), key=lambda one: abs(one - size))
            faults.append(
                f"group_size={size}: {requirements.method} takes {alternatives(allowed)}; the nearest is {near}"
            )
    return faults
