"""The config section of compressed-tensors: groups of modules, each with a scheme; weight-only integers here.

Keys are those of the package's `QuantizationConfig`: config_groups (targets, weights), format, ignore and others. A
target or an ignored name is a module class ("Linear"), a module name, or a pattern "re:...".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from quantline.formats.container import CheckpointError
from quantline.formats.packing import BITS

_FORMAT = "pack-quantized"


@dataclass(frozen=True)
class LayerSettings:
    """How one quantized linear is stored: bits, group size (-1 per output channel), and whether zeros are middle."""

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Scheme:
    """A parsed section: settings of all linears, of those that differ, reordered groups, names left in float."""

    main: LayerSettings
    overrides: Mapping[str, LayerSettings]
    desc_act: bool
    ignored: tuple[str, ...]


def describe(
    main: LayerSettings, overrides: Mapping[str, LayerSettings], desc_act: bool, ignored: Sequence[str]
) -> dict[str, Any]:
    """The section: the main settings for "Linear", then one group of module names for each other setting."""
    if desc_act and main.group_size == -1:
        desc_act = False  # one group has no order, and the package refuses actorder there
    targets: dict[LayerSettings, list[str]] = {main: ["Linear"]}
    for name, settings in overrides.items():
        if settings != main:
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
            "input_activations": None,
            "output_activations": None,
        }
        for index, (settings, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def parse(path: Path, config: Mapping[str, Any]) -> Scheme:
    """Read a section.

    Raises:
        CheckpointError: other formats than pack-quantized, quantized activations or caches, sparsity, transforms,
            float weights, other strategies than group and channel, or groups that are not named module by module.
    """

    def refuse(fact: str, remedy: str = "use a weight-only pack-quantized checkpoint") -> NoReturn:
        raise CheckpointError(f"{path}: compressed-tensors {fact}: {remedy}")

    if config.get("format") != _FORMAT:
        refuse(f"stored as {config.get('format')!r}")
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
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                refuse(f"group {name} has {key}")
        if group.get("format") not in (None, _FORMAT):
            refuse(f"group {name} is stored as {group['format']!r}")
        weights: Any = group.get("weights")
        settings = _settings(weights)
        if settings is None:
            refuse(f"group {name} has weights {weights!r}", "int weights by group or channel of 2, 3, 4 or 8 bits")
        orders.add(_reordered(weights["actorder"]) if weights.get("actorder") else False)
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            refuse(f"group {name} has targets {targets!r}", "restore the config")
        if "Linear" in targets:
            main.append(settings)
        elif all("." in target and not target.startswith("re:") for target in targets):
            overrides.update(dict.fromkeys(targets, settings))
        else:
            refuse(f"group {name} has targets {targets}", "one group for Linear, others by whole module names")
    if len(main) != 1:
        refuse(f"has {len(main)} groups for Linear", "one group for Linear, others by whole module names")
    if None in orders:
        refuse("has an unknown actorder", "known are group and weight")
    ignored = config.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        refuse(f"ignore is {ignored!r}", "restore the config")
    return Scheme(main[0], overrides, True in orders, tuple(ignored))


def _settings(weights: Any) -> LayerSettings | None:
    if not isinstance(weights, dict) or weights.get("type", "int") != "int" or weights.get("dynamic"):
        return None
    bits, size, strategy = weights.get("num_bits", 8), weights.get("group_size"), weights.get("strategy")
    if strategy is None and type(size) is int:
        strategy = "channel" if size == -1 else "group"
    if type(bits) is not int or bits not in BITS or strategy not in ("group", "channel"):
        return None
    if strategy == "channel":
        return LayerSettings(bits, -1, bool(weights.get("symmetric", True))) if size in (None, -1) else None
    if type(size) is not int or size < 1:
        return None
    return LayerSettings(bits, size, bool(weights.get("symmetric", True)))


def _reordered(actorder: Any) -> bool | None:
    """Whether groups follow g_idx; "weight" only changed the calibration. None for an unknown word."""
    if actorder in (True, "group", "dynamic"):
        return True
    return False if actorder in ("weight", "static") else None
