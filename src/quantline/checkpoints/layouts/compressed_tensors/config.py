"""The config section of compressed-tensors: groups of modules, each with a scheme. Only integer weights are supported.

Keys are those of the package's `QuantizationConfig`: config_groups (targets, weights), format, ignore and others. A
target or an ignored name is a module class ("Linear"), a module name, or a pattern "re:...". The format `pack-quantized`
is weight-only. With `int-quantized` the runtime also quantizes activations to 8 bits (W8A8), and all linears have equal
settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LayerSettings
from quantline.checkpoints.layouts.packing import BITS
from quantline.core.errors import CheckpointError

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_INT_FORMAT = "int-quantized"
# Quantization of activations in int-quantized: int8, symmetric, with one scale per token that the runtime computes.
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_INT_WEIGHTS = LayerSettings(8, -1, True)


@dataclass(frozen=True)
class _Format:
    """One `format`: the layout of its tensors, the `type` of its weights, whether activations are rounded too, and its
    settings where it has only one.
    """

    layout: str
    kind: str = "int"
    activations: bool = False
    only: LayerSettings | None = None


_FORMATS = {
    _FORMAT: _Format("compressed_tensors"),
    _INT_FORMAT: _Format("compressed_tensors_int", activations=True, only=_INT_WEIGHTS),
}


@dataclass(frozen=True)
class Scheme:
    """A parsed section: layout, settings of all linears and of those that differ, reordered groups, what stays in float."""

    layout: str
    main: LayerSettings
    overrides: Mapping[str, LayerSettings]
    desc_act: bool
    ignored: tuple[str, ...]
    activation_bits: int | None = None


def section(wanted: Description, *, activations: bool) -> dict[str, Any]:
    """The section; raises what `describe` raises."""
    own = {**wanted.overrides}
    if wanted.quantized_head:
        own.setdefault(LM_HEAD, wanted.main)
    return describe(wanted.main, own, wanted.desc_act, wanted.left_float, activations=activations)


def info_of(path: Path, config: Mapping[str, Any]) -> QuantizationInfo:
    """Read a section; raises what `parse` raises."""
    scheme = parse(path, config)
    return QuantizationInfo(
        method=METHOD, layout=scheme.layout,
        bits=scheme.main.bits, group_size=scheme.main.group_size, desc_act=scheme.desc_act,
        symmetric=scheme.main.symmetric, modules_to_not_convert=scheme.ignored, overrides=scheme.overrides,
        activation_bits=scheme.activation_bits,
    )  # fmt: skip


def describe(
    main: LayerSettings,
    overrides: Mapping[str, LayerSettings],
    desc_act: bool,
    ignored: Sequence[str],
    *,
    activations: bool = False,
) -> dict[str, Any]:
    """The section: the main settings for "Linear", then one group of module names for each other setting.

    activations: write `int-quantized`, whose readers also quantize activations.

    Raises:
        CheckpointError: int-quantized, and weights are not symmetric 8-bit ones per channel, all with equal settings.
    """
    if activations and (main != _INT_WEIGHTS or any(own != main for own in overrides.values())):
        raise CheckpointError(
            "compressed_tensors_int: stores symmetric 8-bit weights with one scale per output channel, all linears alike; "
            "use compressed_tensors"
        )
    if desc_act and main.group_size == -1:
        desc_act = False  # a single group has no order, and the package refuses actorder for it
    targets: dict[LayerSettings, list[str]] = {main: ["Linear"]}
    for name, settings in overrides.items():
        # Readers that find linears by class do not find the output layer, so it is always named.
        if settings != main or name == LM_HEAD:
            targets.setdefault(settings, []).append(name)
    groups = {
        f"group_{index}": {
            "targets": names,
            "weights": {
                "num_bits": settings.bits,
                "type": "int",
                "symmetric": settings.symmetric,
                "strategy": "channel" if settings.group_size == -1 else "group",
                "group_size": None if settings.group_size == -1 else settings.group_size,
                "dynamic": False,
                "actorder": "group" if desc_act and settings.group_size != -1 else None,
            },
            "input_activations": dict(_ACTIVATIONS) if activations else None,
            "output_activations": None,
        }
        for index, (settings, names) in enumerate(targets.items())
    }
    return {
        "quant_method": METHOD,
        "format": _INT_FORMAT if activations else _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def parse(path: Path, config: Mapping[str, Any]) -> Scheme:
    """Read a section.

    Raises:
        CheckpointError: formats other than pack-quantized and int-quantized, activations quantized in another way,
            quantized caches, sparsity, transforms, float weights, strategies other than group and channel, or groups
            that do not name single modules.
    """

    def refuse(fact: str, remedy: str = "use a weight-only pack-quantized checkpoint") -> NoReturn:
        raise CheckpointError(f"{path}: compressed-tensors {fact}: {remedy}")

    stored = str(config.get("format"))
    if stored not in _FORMATS:
        refuse(f"stored as {config.get('format')!r}", f"known are {' and '.join(_FORMATS)}")
    form = _FORMATS[stored]
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            refuse(f"with {key}")
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        refuse("with sparsity_config")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        refuse("without config_groups", "restore the config")
    main: list[LayerSettings] = []
    overrides: dict[str, LayerSettings] = {}
    orders = set()
    for name, group in groups.items():
        if not isinstance(group, dict):
            refuse(f"group {name} is {group!r}, a preset", "write its settings out")
        activations = group.get("input_activations")
        if group.get("output_activations") or (activations and not form.activations):
            refuse(f"group {name} has {'input' if activations else 'output'}_activations")
        if form.activations and not _rounded_by_token(activations):
            refuse(f"stored as {stored!r} with input_activations {activations!r}", "8-bit dynamic ones by token")
        if group.get("format") not in (None, stored):
            refuse(f"group {name} is stored as {group['format']!r}")
        weights: Any = group.get("weights")
        settings = _settings(weights, form.kind)
        if form.only and settings != form.only:
            refuse(f"stored as {stored!r} with weights {weights!r}", "symmetric ones of 8 bits by channel")
        if settings is None:
            refuse(f"group {name} has weights {weights!r}", "int weights by group or channel of 2, 3, 4 or 8 bits")
        orders.add(_reordered(weights["actorder"]) if weights.get("actorder") else False)
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            refuse(f"group {name} has targets {targets!r}", "restore the config")
        if "Linear" in targets:
            main.append(settings)
        elif all(target == LM_HEAD or ("." in target and not target.startswith("re:")) for target in targets):
            overrides.update(dict.fromkeys(targets, settings))
        else:
            refuse(f"group {name} has targets {targets}", "one group for Linear, others by whole module names")
    if len(main) != 1 or (overrides and form.only):
        refuse(f"has {len(main)} groups for Linear", "one group for Linear, others by whole module names")
    if None in orders:
        refuse("has an unknown actorder", "supported are group and weight")
    ignored = config.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        refuse(f"ignore is {ignored!r}", "restore the config")
    return Scheme(form.layout, main[0], overrides, True in orders, tuple(ignored), 8 if form.activations else None)


def _rounded_by_token(activations: Any) -> bool:
    if not isinstance(activations, dict):
        return False
    defaults = {"num_bits": 8, "type": "int", "symmetric": True}
    return all(activations.get(key, defaults.get(key)) == value for key, value in _ACTIVATIONS.items())


def _settings(weights: Any, kind: str) -> LayerSettings | None:
    if not isinstance(weights, dict) or weights.get("type", "int") != kind or weights.get("dynamic"):
        return None
    bits, size, strategy = weights.get("num_bits", 8), weights.get("group_size"), weights.get("strategy")
    if strategy is None and type(size) is int:
        strategy = "channel" if size == -1 else "group"
    symmetric = weights.get("symmetric", True)
    if type(bits) is not int or bits not in BITS or strategy not in ("group", "channel") or type(symmetric) is not bool:
        return None
    if strategy == "channel":
        return LayerSettings(bits, -1, symmetric) if size in (None, -1) else None
    if type(size) is not int or size < 1:
        return None
    return LayerSettings(bits, size, symmetric)


def _reordered(actorder: Any) -> bool | None:
    """Whether groups follow g_idx; "weight" only affected the calibration. None for an unknown value."""
    if actorder in (True, "group", "dynamic"):
        return True
    return False if actorder in ("weight", "static") else None
