"""How a checkpoint says it is quantized: the `quantization_config` that AutoAWQ, AutoGPTQ and transformers write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.formats.container import CheckpointError, read_json
from quantline.formats.packing import BITS


@dataclass(frozen=True)
class QuantizationInfo:
    """What a checkpoint's config says about its quantized linears.

    Attributes:
        method: "awq" or "gptq".
        layout: key in `formats.LAYOUTS`.
        bits, group_size: of every quantized linear; -1 is one group per output channel.
        desc_act: columns were quantized in the order of their activations (GPTQ).
        symmetric: the config promises that every zero point is the middle one (GPTQ's sym, AWQ's zero_point false).
        modules_to_not_convert: names of modules left in float.
    """

    method: str
    layout: str
    bits: int
    group_size: int
    desc_act: bool
    symmetric: bool
    modules_to_not_convert: tuple[str, ...]


# config's version (AWQ) or checkpoint_format (GPTQ) -> layout. AWQ's exllama versions are stored as GEMM.
_AWQ_VERSIONS = {"gemm": "awq_gemm", "gemv": "awq_gemv", "exllama": "awq_gemm", "exllamav2": "awq_gemm"}
_GPTQ_FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
_SHARED_KEYS = ("quant_method", "checkpoint_format", "bits", "group_size", "desc_act", "sym")


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
    else:
        raise CheckpointError(
            f"{path}: quant_method is {method!r}: known are awq and gptq; use a checkpoint in one of them"
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
    if config.get("dynamic"):
        raise CheckpointError(
            f"{path}: has per-module overrides (dynamic): use a checkpoint with one setting throughout"
        )
    return QuantizationInfo(
        method=method,
        layout=layout,
        bits=bits,
        group_size=group_size,
        desc_act=bool(config.get("desc_act", False)),
        symmetric=bool(config.get("sym", False)) if method == "gptq" else not config.get("zero_point", True),
        modules_to_not_convert=tuple(config.get("modules_to_not_convert") or ()),
    )
