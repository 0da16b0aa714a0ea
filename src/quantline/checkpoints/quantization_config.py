"""The `quantization_config` of a checkpoint's config.json, as each layout writes and reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.checkpoints.layouts.registry import CONFIG_SECTIONS, LAYOUTS
from quantline.core.errors import CheckpointError
from quantline.core.files import read_json

__all__ = ["LayerSettings", "QuantizationInfo", "describe", "own_file", "quantization_of", "section_of"]

# Keys on which config.json and a method's own file must agree.
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
    """How a checkpoint is quantized, from `config.json` and AutoGPTQ's `quantize_config.json`; None for a float one.

    Raises:
        CheckpointError: there is no config, two configs disagree, or the layout is not one of `layouts.LAYOUTS`.
    """
    folder = Path(folder)
    own = {known.own_file: method for method, known in CONFIG_SECTIONS.items() if known.own_file is not None}
    paths = [folder / name for name in ("config.json", *own) if (folder / name).exists()]
    if not paths:
        raise CheckpointError(f"{folder}: has no config.json: it is not a model folder")
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        config = read_json(path)
        method = own.get(path.name)
        config = config.get("quantization_config") or {} if method is None else {"quant_method": method, **config}
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
                    f"{path}: {key} is {config[key]!r}, but {other_path.name} says {other[key]!r}: correct the wrong one"
                )
        config = {**other, **config}
    method = str(config.get("quant_method", "")).lower()
    if method not in CONFIG_SECTIONS:
        *others, last = CONFIG_SECTIONS
        raise CheckpointError(
            f"{path}: quant_method is {method!r}: supported are {', '.join(others)} and {last}; use one of these"
        )
    return CONFIG_SECTIONS[method].parse(path, config)
