"""The config section of compressed-tensors: groups of modules, each with a scheme.

Keys are those of the package's `QuantizationConfig`: config_groups (targets, weights), format, ignore and others. A
target or an ignored name is a module class ("Linear"), a module name, or a pattern "re:...". The format `pack-quantized`
has integer weights; inputs stay as they are, or are rounded to FP8 (W4AFP8). With `int-quantized` the runtime rounds inputs
to 8-bit integers (W8A8, W4A8), and all linears have equal settings. Floating-point weights are those of `schemes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from quantline.checkpoints.layouts.compressed_tensors import schemes
from quantline.checkpoints.layouts.description import Activations, Description, QuantizationInfo
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LayerSettings
from quantline.checkpoints.layouts.packing import BITS
from quantline.core.errors import CheckpointError

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_INT_FORMAT = "int-quantized"
# Inputs that are rounded: with one scale per token that the runtime computes.
_BY_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
INT8 = Activations("int8", "token")
FP8 = Activations("e4m3", "token")
_TYPES = {"int": INT8, "float": FP8}


@dataclass(frozen=True)
class _Format:
    """One `format` with integer weights: how it rounds inputs -> the layout of its tensors; whether linears are alike."""

    layouts: Mapping[Activations | None, str]
    alike: bool = False


_FORMATS = {
    _FORMAT: _Format({None: "compressed_tensors", FP8: "compressed_tensors_w4afp8"}),
    _INT_FORMAT: _Format({INT8: "compressed_tensors_int"}, alike=True),
}


@dataclass(frozen=True)
class Scheme:
    """A parsed section: layout, settings of all linears and of those that differ, reordered groups, what stays in float."""

    layout: str
    main: LayerSettings
    overrides: Mapping[str, LayerSettings]
    desc_act: bool
    ignored: tuple[str, ...]
    activations: Activations | None = None


def section(wanted: Description, *, activations: Activations | None) -> dict[str, Any]:
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
        activations=scheme.activations,
    )  # fmt: skip


def describe(
    main: LayerSettings,
    overrides: Mapping[str, LayerSettings],
    desc_act: bool,
    ignored: Sequence[str],
    *,
    activations: Activations | None = None,
) -> dict[str, Any]:
    """The section: the main settings for "Linear", then one group of module names for each other setting.

    activations: how readers round inputs; to 8-bit integers, the format is `int-quantized`.

    Raises:
        CheckpointError: inputs are rounded, and weights are not symmetric ones of 4 bits, or 8 bits with one scale per
            output channel, all with equal settings.
    """
    if activations and (not _beside(activations, main) or any(own != main for own in overrides.values())):
        raise CheckpointError(
            f"{_layout(activations)}: {_beside_what(activations)}, all linears alike; use compressed_tensors"
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
            "input_activations": dict(_rounding(activations)) if activations else None,
            "output_activations": None,
        }
        for index, (settings, names) in enumerate(targets.items())
    }
    return {
        "quant_method": METHOD,
        "format": _INT_FORMAT if activations == INT8 else _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*ignored, *map(_inside, filter(_holds_experts, ignored))],
        "kv_cache_scheme": None,
    }


def _holds_experts(name: str) -> bool:
    return name.endswith(".experts")


def _inside(name: str) -> str:
    """The pattern of everything inside a module; vLLM 0.32 asks for the first expert's linears, not for the module."""
    return f"re:{re.escape(name)}\\..*"


def parse(path: Path, config: Mapping[str, Any]) -> Scheme:
    """Read a section.

    Raises:
        CheckpointError: an unknown format, inputs rounded in a way that it does not have, caches in other than FP8,
            sparsity, transforms, strategies other than group and channel, or groups that do not name single modules.
    """

    refuse = partial(_refuse, path)
    stored = str(config.get("format"))
    if stored not in (*_FORMATS, *schemes.FORMATS):
        refuse(f"stored as {config.get('format')!r}", f"known are {', '.join((*_FORMATS, *schemes.FORMATS))}")
    if config.get("transform_config"):
        refuse("with transform_config")
    if (cache := config.get("kv_cache_scheme")) and not _fixed_fp8(cache):
        refuse(f"with kv_cache_scheme {cache!r}", "FP8 with one fixed scale a layer, or none")
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        refuse("with sparsity_config")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        refuse("without config_groups", "restore the config")
    ignored = config.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        refuse(f"ignore is {ignored!r}", "restore the config")
    if stored in schemes.FORMATS:
        found = schemes.parse(path, stored, groups)
        return Scheme(found.layout, found.settings, {}, False, tuple(ignored), found.activations)
    form = _FORMATS[stored]
    main: list[LayerSettings] = []
    overrides: dict[str, LayerSettings] = {}
    orders = set()
    rounded: set[Activations | None] = set()
    for name, group in groups.items():
        settings, own = _group(path, stored, name, group)
        rounded.add(own)
        weights, targets = group["weights"], group.get("targets")
        orders.add(_reordered(weights["actorder"]) if weights.get("actorder") else False)
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            refuse(f"group {name} has targets {targets!r}", "restore the config")
        if "Linear" in targets:
            main.append(settings)
        elif all(target == LM_HEAD or ("." in target and not target.startswith("re:")) for target in targets):
            overrides.update(dict.fromkeys(targets, settings))
        else:
            refuse(f"group {name} has targets {targets}", "one group for Linear, others by whole module names")
    if len(main) != 1 or len(rounded) != 1 or (overrides and form.alike):
        refuse(f"has {len(main)} groups for Linear", "one group for Linear, others by whole module names")
    if None in orders:
        refuse("has an unknown actorder", "supported are group and weight")
    how = rounded.pop()
    return Scheme(form.layouts[how], main[0], overrides, True in orders, tuple(ignored), how)


def _refuse(path: Path, fact: str, remedy: str = "use a weight-only pack-quantized checkpoint") -> NoReturn:
    raise CheckpointError(f"{path}: compressed-tensors {fact}: {remedy}")


def _group(path: Path, stored: str, name: str, group: Any) -> tuple[LayerSettings, Activations | None]:
    """The settings of a group's weights, and how its inputs are rounded."""
    refuse = partial(_refuse, path)
    if not isinstance(group, dict):
        refuse(f"group {name} is {group!r}, a preset", "write its settings out")
    activations, weights = group.get("input_activations"), group.get("weights")
    if group.get("output_activations"):
        refuse(f"group {name} has output_activations")
    own = _rounded_by_token(activations) if activations else None
    if own not in _FORMATS[stored].layouts or (activations and own is None):
        refuse(f"stored as {stored!r} with input_activations {activations!r}", "8-bit dynamic ones by token")
    if group.get("format") not in (None, stored):
        refuse(f"group {name} is stored as {group['format']!r}")
    settings = _settings(weights)
    if settings is None:
        refuse(f"group {name} has weights {weights!r}", "int weights by group or channel of 2, 3, 4 or 8 bits")
    if own and not _beside(own, settings):
        refuse(f"stored as {stored!r} with weights {weights!r}", _beside_what(own))
    return settings, own


def _fixed_fp8(cache: Any) -> bool:
    """Whether keys and values are kept in FP8 with the scales in the checkpoint, `k_scale` and `v_scale` of a layer."""
    kept = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return isinstance(cache, dict) and all(cache.get(key, False) == value for key, value in kept.items())


def _layout(activations: Activations) -> str:
    return next(form.layouts[activations] for form in _FORMATS.values() if activations in form.layouts)


def _beside(activations: Activations, weights: LayerSettings) -> bool:
    """Whether a layout has such weights beside inputs that are rounded so."""
    return weights.symmetric and (weights.bits == 4 or (activations == INT8 and weights == LayerSettings(8, -1, True)))


def _beside_what(activations: Activations) -> str:
    eight = " or 8 bits with one scale per output channel" if activations == INT8 else ""
    return f"stores symmetric weights of 4 bits{eight}"


def _rounding(activations: Activations) -> dict[str, Any]:
    return {**_BY_TOKEN, "type": next(kind for kind, one in _TYPES.items() if one == activations)}


def _rounded_by_token(activations: Any) -> Activations | None:
    """How inputs are rounded; None if in another way than by token, to 8 bits."""
    if not isinstance(activations, dict):
        return None
    defaults = {"num_bits": 8, "symmetric": True}
    if any(activations.get(key, defaults.get(key)) != value for key, value in _BY_TOKEN.items()):
        return None
    return _TYPES.get(str(activations.get("type", "int")))


def _settings(weights: Any) -> LayerSettings | None:
    if not isinstance(weights, dict) or weights.get("type", "int") != "int" or weights.get("dynamic"):
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
