"""The `quantization_config` of a checkpoint's config.json, as each layout writes and reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.config_values import renamed
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.checkpoints.layouts.registry import CONFIG_SECTIONS, LAYOUTS
from quantline.core.errors import CheckpointError
from quantline.core.files import read_json

__all__ = [
    "LayerSettings", "QuantizationInfo", "describe", "described_in", "float_config", "has_own_file", "is_quantized",
    "own_file", "quantization_of", "section_of",
]  # fmt: skip

# Keys on which config.json and a method's own file must agree.
_SHARED_KEYS = ("quant_method", "checkpoint_format", "bits", "group_size", "desc_act", "sym")
# Keys of config.json that hold the section, and what old tools left out of it.
_SECTIONS: dict[str, dict[str, Any]] = {
    "quantization_config": {}, "compression_config": {"quant_method": "compressed-tensors"},
}  # fmt: skip
# Files beside config.json that hold it -> the method of whose tool they are.
_OWN_FILES = {
    name: method
    for method, known in CONFIG_SECTIONS.items()
    for name in (known.own_file, known.old_file)
    if name is not None
}


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

    Args:
        layout: key in `layouts.LAYOUTS`.
        bits, group_size: of the quantized linears; -1 is one group per output channel.
        symmetric, desc_act, overrides, quantized_head: see `Description`.
        modules_to_not_convert: names of the linears left in float.

    Raises:
        CheckpointError: the layout's config cannot express this.
    """
    main = LayerSettings(bits, group_size, symmetric)
    wanted = Description(main, desc_act, tuple(modules_to_not_convert), dict(overrides or {}), quantized_head)
    return section_of(layout, wanted)


def section_of(layout: str, wanted: Description) -> dict[str, Any]:
    """As `describe`, for a description.

    Raises:
        CheckpointError: the layout's config cannot express this.
    """
    known = LAYOUTS.get(layout)
    if known is None or known.config is None:
        described = [name for name, one in LAYOUTS.items() if one.config is not None]
        raise CheckpointError(f"{layout}: config.json cannot describe it; it describes {', '.join(described)}")
    return known.config.describe(wanted)


def own_file(section: Mapping[str, Any]) -> str | None:
    """The file next to config.json in which readers also look for the section."""
    known = CONFIG_SECTIONS.get(str(section.get("quant_method")))
    return None if known is None else known.own_file


def quantization_of(folder: str | Path) -> QuantizationInfo | None:
    """How a checkpoint is quantized; None for a float one.

    Raises:
        CheckpointError: there is no config, two descriptions disagree, or the layout is not one of `layouts.LAYOUTS`.
    """
    found = described_in(folder)
    if found is None:
        return None
    path, section = found
    method = str(section.get("quant_method", "")).lower()
    if method not in CONFIG_SECTIONS:
        *others, last = CONFIG_SECTIONS
        raise CheckpointError(
            f"{path}: quant_method is {method!r}: supported are {', '.join(others)} and {last}; use one of these"
        )
    return CONFIG_SECTIONS[method].parse(path, section)


def described_in(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The quantization's description in the keys of `quantization_config`, wherever tools put it, and its (first) file.

    Looked for in config.json (under `quantization_config` or, of old compressed-tensors, `compression_config`; also inside
    `text_config`), in AutoGPTQ's quantize_config.json, AutoAWQ's quant_config.json and ModelOpt's hf_quant_config.json. None
    for a float model.

    Raises:
        CheckpointError: there is no config, one is no JSON object, two disagree, or it is in a form that is not supported.
    """
    folder = Path(folder)
    paths = [path for path in (folder / "config.json", *(folder / name for name in _OWN_FILES)) if path.exists()]
    if not paths:
        raise CheckpointError(f"{folder}: has no config.json: it is not a model folder")
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        content, method = read_json(path), _OWN_FILES.get(path.name)
        sections = _sections(path, content) if method is None else [{"quant_method": method, **content}]
        found += [(path, renamed(section)) for section in sections if section]
    if not found:
        return None
    path, merged = found[0]
    for other_path, other in found[1:]:
        for key in _SHARED_KEYS:
            if key in merged and key in other and merged[key] != other[key]:
                where = other_path.name if other_path != path else f"another section of {path.name}"
                raise CheckpointError(
                    f"{path}: {key} is {merged[key]!r}, but {where} says {other[key]!r}: correct the wrong one"
                )
        merged = {**other, **merged}
    return path, merged


def has_own_file(folder: Path) -> bool:
    """Whether a file beside config.json describes the quantization."""
    return any((folder / name).exists() for name in _OWN_FILES)


def float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without any description of a quantization."""
    plain = {key: value for key, value in config.items() if key not in _SECTIONS}
    if isinstance(config.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in config["text_config"].items() if key not in _SECTIONS}
    return plain


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a quantization itself."""
    text = config.get("text_config")
    return any(place.get(key) for place in (config, text) if isinstance(place, Mapping) for key in _SECTIONS)


def _sections(path: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = config.get("text_config")
    found = []
    for place in (config, text if isinstance(text, dict) else {}):
        for key, method in _SECTIONS.items():
            section = place.get(key) or {}
            if not isinstance(section, dict):
                raise CheckpointError(f"{path}: {key} is not a JSON object: restore the file")
            found.append({**method, **section} if section else {})
    return found
