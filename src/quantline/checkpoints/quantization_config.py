"""How a checkpoint says it is quantized: the `quantization_config` of AutoAWQ, AutoGPTQ and compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts import bitsandbytes
from quantline.checkpoints.layouts.compressed_tensors import config as compressed_tensors_config
from quantline.checkpoints.layouts.compressed_tensors.config import LayerSettings
from quantline.checkpoints.layouts.packing import BITS
from quantline.core.errors import CheckpointError
from quantline.core.files import read_json

__all__ = ["LayerSettings", "QuantizationInfo", "describe", "quantization_of"]


@dataclass(frozen=True)
class QuantizationInfo:
    """What a checkpoint's config says about its quantized linears.

    Attributes:
        method: "awq", "gptq", "compressed-tensors" or "bitsandbytes".
        layout: key in `formats.LAYOUTS`, or bitsandbytes, whose groups are its blocks.
        bits, group_size: of every quantized linear but the overrides; -1 is one group per output channel.
        desc_act: columns were quantized in the order of their activations (GPTQ).
        symmetric: the config promises that every zero point is the middle one (GPTQ's sym, AWQ's zero_point false).
        modules_to_not_convert: names of modules left in float; compressed-tensors also has ``re:`` patterns there.
        overrides: module name -> settings of linears that differ from the rest (compressed-tensors).
        patterns: the same by regular expressions that match a name's beginning, the first one counts (GPTQ's dynamic).
        activation_bits: 8 where a runtime also rounds what goes into the quantized linears, symmetrically, with one scale
            a token (W8A8); None where it does not.
    """

    method: str
    layout: str
    bits: int
    group_size: int
    desc_act: bool
    symmetric: bool
    modules_to_not_convert: tuple[str, ...]
    overrides: Mapping[str, LayerSettings] = field(default_factory=dict)
    patterns: tuple[tuple[str, LayerSettings], ...] = ()
    activation_bits: int | None = None

    def of(self, layer: str) -> LayerSettings:
        """Bits, group size and symmetry of one quantized linear."""
        if layer in self.overrides:
            return self.overrides[layer]
        found = (own for pattern, own in self.patterns if re.match(pattern, layer))
        return next(found, LayerSettings(self.bits, self.group_size, self.symmetric))


# config's version (AWQ) or checkpoint_format (GPTQ) -> layout. AWQ's exllama versions are stored as GEMM.
_AWQ_VERSIONS = {"gemm": "awq_gemm", "gemv": "awq_gemv", "exllama": "awq_gemm", "exllamav2": "awq_gemm"}
_GPTQ_FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
# What vLLM makes of several linears.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_SHARED_KEYS = ("quant_method", "checkpoint_format", "bits", "group_size", "desc_act", "sym")


def describe(
    layout: str,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    desc_act: bool = False,
    modules_to_not_convert: Sequence[str] = (),
    overrides: Mapping[str, LayerSettings] | None = None,
    quantized_head: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` section of config.json; for GPTQ it is also the content of quantize_config.json.

    AWQ always says ``zero_point: true``: its tensors hold zero points, and readers ignore them where it is false.
    GPTQ names float linears other than lm_head as negative ``dynamic`` patterns, which GPTQModel and vLLM know;
    transformers and AutoGPTQ find them by their tensors.

    Args:
        layout: key in `formats.LAYOUTS`.
        bits, group_size: of the quantized linears; -1 is one group per output channel.
        symmetric: every zero point of every quantized linear is ``2**(bits-1)``: GPTQ readers then ignore them.
        desc_act: groups are reordered by activation.
        modules_to_not_convert: names of the linears left in float.
        overrides: module name -> settings of linears that differ (GPTQ and compressed-tensors).
        quantized_head: the output layer `lm_head` is among the quantized linears, which vLLM wants to be told.

    Raises:
        CheckpointError: the layout has no way to say this.
    """
    ignored = list(modules_to_not_convert)
    if layout in ("compressed_tensors", "compressed_tensors_int"):
        main, rounded = LayerSettings(bits, group_size, symmetric), layout == "compressed_tensors_int"
        own = {**(overrides or {})}
        if quantized_head:
            own.setdefault("lm_head", main)
        return compressed_tensors_config.describe(main, own, desc_act, ignored, activations=rounded)
    if overrides and layout not in _GPTQ_FORMATS:
        raise CheckpointError(
            f"{layout}: {next(iter(overrides))} and {len(overrides) - 1} other linears have settings of their own, "
            "which readers of this layout do not know: convert to gptq or compressed_tensors"
        )
    common = {"bits": bits, "group_size": group_size}
    if layout in ("awq_gemm", "awq_gemv"):
        if bits != 4 or desc_act:
            raise CheckpointError(f"{layout}: holds 4 bits and no desc_act: convert to gptq or compressed_tensors")
        version = {"version": layout.removeprefix("awq_"), "zero_point": True}
        head = {"lm_head": True} if quantized_head else {}
        return {"quant_method": "awq", **common, **version, **head, "modules_to_not_convert": ignored or None}
    if layout not in _GPTQ_FORMATS:
        raise CheckpointError(f"{layout}: no config section is known for this layout; use one of formats.LAYOUTS")
    config = {"quant_method": "gptq", "checkpoint_format": layout, **common, "desc_act": desc_act, "sym": symmetric}
    excluded = [name for name in ignored if name != "lm_head"]
    if excluded or overrides:
        config["dynamic"] = _dynamic(excluded, overrides or {})
    return {**config, "lm_head": quantized_head, "modules_to_not_convert": ignored}


def _dynamic(excluded: Sequence[str], overrides: Mapping[str, LayerSettings]) -> dict[str, dict[str, Any]]:
    """Patterns of names for GPTQ readers: `-:` leaves a module in float, `+:` gives it settings of its own.

    vLLM asks for the fused modules that it makes of q, k, v and of gate and up, so these are named too where all of their
    parts agree.
    """
    patterns: dict[str, dict[str, Any]] = {
        f"-:^{re.escape(name)}$": {} for name in _with_fused(dict.fromkeys(excluded))
    }
    for name, own in _with_fused(overrides).items():
        patterns[f"+:^{re.escape(name)}$"] = {"bits": own.bits, "group_size": own.group_size, "sym": own.symmetric}
    return patterns


def _with_fused(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(settings)
    for name, own in settings.items():
        parent, _, last = name.rpartition(".")
        for fused, parts in _FUSED.items():
            others = [f"{parent}.{part}" for part in parts[1:]]
            if last == parts[0] and all(other in settings and settings[other] == own for other in others):
                found[f"{parent}.{fused}"] = own
    return found


def quantization_of(folder: str | Path) -> QuantizationInfo | None:
    """How a checkpoint is quantized, from `config.json` and AutoGPTQ's `quantize_config.json`; None for a float one.

    Raises:
        CheckpointError: no config, two configs that disagree, or a quantization that is not one of `formats.LAYOUTS`.
    """
    folder = Path(folder)
    paths = [path for path in (folder / "config.json", folder / "quantize_config.json") if path.exists()]
    if not paths:
        raise CheckpointError(f"{folder}: has no config.json: it is not a model folder")
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        config = read_json(path)
        if path.name == "config.json":
            config = config.get("quantization_config") or {}
        else:
            config = {"quant_method": "gptq", **config}
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: quantization_config is not a JSON object: restore the file")
        if config:
            found.append((path, config))
    if not found:
        return None
    path, config = found[0]
    for other_path, other in found[1:]:
        for key in _SHARED_KEYS:
            if key in config and key in other and config[key] != other[key]:
                raise CheckpointError(
                    f"{path}: {key} is {config[key]!r}, {other_path.name} says {other[key]!r}: correct the wrong one"
                )
        config = {**other, **config}
    return _parse_quantization(path, config)


def _parse_quantization(path: Path, config: Mapping[str, Any]) -> QuantizationInfo:
    method = str(config.get("quant_method", "")).lower()
    if method == "awq":
        versions, version = _AWQ_VERSIONS, config.get("version") or config.get("checkpoint_format") or "gemm"
    elif method == "gptq":
        versions, version = _GPTQ_FORMATS, config.get("checkpoint_format") or "gptq"
        if config.get("is_marlin_format"):
            version = "marlin"
    elif method == "compressed-tensors":
        scheme = compressed_tensors_config.parse(path, config)
        main = scheme.main
        return QuantizationInfo(
            method=method,
            layout="compressed_tensors_int" if scheme.activation_bits else "compressed_tensors",
            bits=main.bits,
            group_size=main.group_size,
            desc_act=scheme.desc_act,
            symmetric=main.symmetric,
            modules_to_not_convert=scheme.ignored,
            overrides=scheme.overrides,
            activation_bits=scheme.activation_bits,
        )
    elif method == bitsandbytes.NAME:
        try:
            bits, group_size, skipped = bitsandbytes.parse(config)
        except FormatError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return QuantizationInfo(
            method=method, layout=method, bits=bits, group_size=group_size, desc_act=False, symmetric=True,
            modules_to_not_convert=skipped,
        )  # fmt: skip
    else:
        raise CheckpointError(
            f"{path}: quant_method is {method!r}: known are awq, gptq, compressed-tensors and bitsandbytes; "
            "use a checkpoint in one of them"
        )
    layout = versions.get(str(version).lower())
    if layout is None:
        raise CheckpointError(
            f"{path}: {method} stored as {version!r}: known are {', '.join(versions)}; convert it first"
        )
    bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    allowed = (4,) if method == "awq" else BITS
    if type(bits) is not int or bits not in allowed:
        raise CheckpointError(f"{path}: bits is {bits!r}: {method} takes {' or '.join(map(str, allowed))}")
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise CheckpointError(f"{path}: group_size is {group_size!r}: it must be -1 or positive")
    symmetric = bool(config.get("sym", False)) if method == "gptq" else not config.get("zero_point", True)
    return QuantizationInfo(
        method=method,
        layout=layout,
        bits=bits,
        group_size=group_size,
        desc_act=bool(config.get("desc_act", False)),
        symmetric=symmetric,
        modules_to_not_convert=tuple(config.get("modules_to_not_convert") or ()),
        patterns=_patterns(path, config.get("dynamic") or {}, LayerSettings(bits, group_size, symmetric)),
    )


def _patterns(path: Path, dynamic: object, main: LayerSettings) -> tuple[tuple[str, LayerSettings], ...]:
    """GPTQ's `dynamic`. Negative patterns only leave modules out, and which ones those are, their tensors say."""
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{path}: dynamic is not a JSON object: restore the file")
    found = []
    for key, own in dynamic.items():
        if str(key).startswith("-:"):
            continue
        known = {"bits": main.bits, "group_size": main.group_size, "sym": main.symmetric}
        if not isinstance(own, dict) or set(own) - {*known, "desc_act"}:
            raise CheckpointError(f"{path}: dynamic {key!r} sets {own!r}: known are bits, group_size and sym")
        values = {**known, **own}
        if values["bits"] not in BITS or type(values["group_size"]) is not int:
            raise CheckpointError(f"{path}: dynamic {key!r} sets {own!r}: bits are 2, 3, 4 or 8, group_size a number")
        try:
            re.compile(str(key).removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{path}: dynamic {key!r} is no regular expression ({error}): correct it") from error
        settings = LayerSettings(values["bits"], values["group_size"], bool(values["sym"]))
        found.append((str(key).removeprefix("+:"), settings))
    return tuple(found)
