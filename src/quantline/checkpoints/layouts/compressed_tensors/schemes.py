"""The schemes of compressed-tensors with weights of floating-point codes, as its section in config.json names them.

Presets are llm-compressor's. A scheme says how codes and scales are stored (`floats`), and how the runtime rounds the
inputs of linears. Source: compressed-tensors 0.19, `quantization/quant_scheme.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.description import Activations, Description
from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.core.errors import CheckpointError

METHOD = "compressed-tensors"
BLOCK = 128
NVFP4, MXFP4, MXFP8, FP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "float-quantized"
FORMATS = (FP8, NVFP4, MXFP4, MXFP8)


@dataclass(frozen=True)
class FloatScheme:
    """A scheme of floating-point weights.

    Attributes:
        preset: llm-compressor's name.
        format: `format` in config.json.
        bits, group_size: of a weight; -1 is one scale a row or for all of them.
        strategy: of the weights' scales, in the library's words.
        inputs: the section `input_activations`; None where inputs stay as they are.
        activations: the same for the reference engine.
    """

    preset: str
    format: str
    bits: int
    group_size: int
    strategy: str
    inputs: Mapping[str, Any] | None = None
    activations: Activations | None = None

    @property
    def layout(self) -> str:
        """Its key in `layouts.LAYOUTS`."""
        return f"compressed_tensors_{self.preset.lower()}"

    @property
    def settings(self) -> LayerSettings:
        """Of each of its linears."""
        return LayerSettings(self.bits, self.group_size, True)

    @property
    def weights(self) -> dict[str, Any]:
        """The section `weights`."""
        own = _args(self.bits, self.strategy, None if self.strategy == "block" else self.group_size)
        if self.strategy == "block":
            own["block_structure"] = [BLOCK, BLOCK]
        return {**own, **_SCALES.get(self.format, {})}


def _args(bits: int, strategy: str, size: int | None, dynamic: bool | str = False) -> dict[str, Any]:
    group = {} if size in (None, -1) else {"group_size": size}
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic, **group}


_SCALES = {
    NVFP4: {"scale_dtype": "torch.float8_e4m3fn"}, MXFP4: {"scale_dtype": "torch.uint8"},
    MXFP8: {"scale_dtype": "torch.uint8"},
}  # fmt: skip

_ALL = (
    FloatScheme(
        "FP8_DYNAMIC", FP8, 8, -1, "channel", _args(8, "token", None, True), Activations("e4m3", "token")
    ),
    FloatScheme("FP8", FP8, 8, -1, "tensor", _args(8, "tensor", None), Activations("e4m3", "tensor", tensor="input_scale")),
    FloatScheme(
        "FP8_BLOCK", FP8, 8, BLOCK, "block", _args(8, "group", BLOCK, True), Activations("e4m3", "group", BLOCK)
    ),
    FloatScheme(
        "NVFP4", NVFP4, 4, 16, "tensor_group", {**_args(4, "tensor_group", 16, "local"), **_SCALES[NVFP4]},
        Activations("e2m1", "group", 16, scales="e4m3", tensor="input_global_scale"),
    ),
    FloatScheme("NVFP4A16", NVFP4, 4, 16, "tensor_group"),
    FloatScheme(
        "MXFP4", MXFP4, 4, 32, "group", {**_args(4, "group", 32, True), **_SCALES[MXFP4]},
        Activations("e2m1", "group", 32, scales="e8m0"),
    ),
    FloatScheme("MXFP4A16", MXFP4, 4, 32, "group"),
    FloatScheme(
        "MXFP8", MXFP8, 8, 32, "group", {**_args(8, "group", 32, True), **_SCALES[MXFP8]},
        Activations("e4m3", "group", 32, scales="e8m0"),
    ),
    FloatScheme("MXFP8A16", MXFP8, 8, 32, "group"),
)  # fmt: skip
SCHEMES: Mapping[str, FloatScheme] = {scheme.preset: scheme for scheme in _ALL}


def section(wanted: Description, *, scheme: FloatScheme) -> dict[str, Any]:
    """The section of config.json.

    Raises:
        CheckpointError: linears differ, or have other bits or groups than the scheme's.
    """
    if wanted.main != scheme.settings or any(own != wanted.main for own in wanted.overrides.values()):
        raise CheckpointError(
            f"{scheme.layout}: stores {scheme.bits} bits with group_size={scheme.group_size}, all linears alike; "
            "leave linears that should differ in float"
        )
    group = {
        "targets": ["Linear"], "weights": scheme.weights, "output_activations": None, "format": scheme.format,
        "input_activations": dict(scheme.inputs) if scheme.inputs else None,
    }  # fmt: skip
    return {
        "quant_method": METHOD, "format": scheme.format, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": list(wanted.left_float), "kv_cache_scheme": None,
    }  # fmt: skip


def parse(path: Path, stored: str, groups: Mapping[str, Any]) -> FloatScheme:
    """The scheme of a parsed section, whose `format` and `config_groups` are given.

    Raises:
        CheckpointError: there are several groups, or no scheme has these weights and inputs.
    """
    group = next(iter(groups.values()))
    targets = group.get("targets") if isinstance(group, dict) else None
    if len(groups) != 1 or not isinstance(targets, list) or "Linear" not in targets:
        raise CheckpointError(
            f"{path}: compressed-tensors {stored} with groups {', '.join(groups)}: one group for Linear can be read; "
            "use a checkpoint whose linears are alike"
        )
    weights, inputs = group.get("weights"), group.get("input_activations")
    for scheme in _ALL:
        same = scheme.format == stored and _same(scheme.weights, weights) and _same(scheme.inputs, inputs)
        if same and not group.get("output_activations"):
            return scheme
    raise CheckpointError(
        f"{path}: compressed-tensors {stored} with weights {weights!r} and inputs {inputs!r}: known are "
        f"{', '.join(SCHEMES)}; use one of these"
    )


def _same(known: Mapping[str, Any] | None, given: Any) -> bool:
    if not known or not given:
        return not known and not given
    if not isinstance(given, dict):
        return False
    defaults = {"symmetric": True, "dynamic": False}
    # Older versions leave out the dtype of scales, which the format says.
    keys = [key for key in known if key != "scale_dtype" or given.get(key) is not None]
    return all(given.get(key, defaults.get(key)) == known[key] for key in keys)
