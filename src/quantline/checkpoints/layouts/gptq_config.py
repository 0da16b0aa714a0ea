"""The config section of both GPTQ layouts: AutoGPTQ's, with GPTQModel's ``dynamic`` for linears with other settings.

The same section is the content of quantize_config.json, which AutoGPTQ looks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.config_values import bits_and_groups, flag, names, one_of, patterns
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LayerSettings
from quantline.checkpoints.layouts.packing import BITS

METHOD = "gptq"
OWN_FILE = "quantize_config.json"
# checkpoint_format in the config -> layout
FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
# Modules that vLLM fuses from several linears.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def format_of(config: Mapping[str, Any]) -> str:
    """Under which name of `checkpoint_format` a section's weights are stored; AutoGPTQ's first sections name none."""
    return "marlin" if config.get("is_marlin_format") else str(config.get("checkpoint_format") or "gptq")


def describe(layout: str, wanted: Description) -> dict[str, Any]:
    """The section.

    Float linears other than lm_head are negative ``dynamic`` patterns, which GPTQModel and vLLM read; transformers and
    AutoGPTQ find them by their tensors. Readers ignore zero points if ``sym`` is true.
    """
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "checkpoint_format": layout,
        "bits": wanted.main.bits,
        "group_size": wanted.main.group_size,
        "desc_act": wanted.desc_act,
        "sym": wanted.main.symmetric,
    }
    excluded = [name for name in wanted.left_float if name != LM_HEAD]
    if excluded or wanted.overrides:
        config["dynamic"] = _dynamic(excluded, wanted.overrides)
    return {**config, "lm_head": wanted.quantized_head, "modules_to_not_convert": list(wanted.left_float)}


def parse(path: Path, config: Mapping[str, Any]) -> QuantizationInfo:
    """Read a section.

    Raises:
        CheckpointError: the format is unknown, or bits, group size or patterns are invalid.
    """
    layout = one_of(path, METHOD, format_of(config), FORMATS)
    bits, group_size = bits_and_groups(path, METHOD, config, BITS)
    symmetric = flag(path, config, "sym", False)
    return QuantizationInfo(
        method=METHOD, layout=layout, bits=bits, group_size=group_size, desc_act=flag(path, config, "desc_act", False),
        symmetric=symmetric, modules_to_not_convert=names(path, config, "modules_to_not_convert"),
        patterns=patterns(path, config, LayerSettings(bits, group_size, symmetric)),
    )  # fmt: skip


def _dynamic(excluded: Sequence[str], overrides: Mapping[str, LayerSettings]) -> dict[str, dict[str, Any]]:
    """Patterns of names for GPTQ readers: `-:` leaves a module in float, `+:` gives it other settings.

    vLLM looks up the modules that it fuses from q, k, v and from gate and up, so these are named too if all of their parts
    agree.
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
