"""The layout that a quantizer writes, by its options and linears, and the layout that a conversion makes of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from quantline.checkpoints.layouts import LAYOUTS, TARGETS, Layout, awq, bitsandbytes, gptq, gptq_v2
from quantline.checkpoints.layouts.compressed_tensors import int_quantized, pack_quantized
from quantline.checkpoints.layouts.compressed_tensors.schemes import SCHEMES, FloatScheme
from quantline.checkpoints.layouts.gguf import layout as gguf
from quantline.checkpoints.layouts.gguf import planned
from quantline.checkpoints.layouts.linear_spec import LinearSpec


def layout_of(specs: set[LinearSpec], symmetric: bool) -> str:
    """The layout for round to nearest; AWQ stores only 4 bits, with equal settings for all linears."""
    if symmetric:
        return gptq.NAME
    return awq.VERSIONS["gemm"] if len(specs) == 1 and next(iter(specs)).bits == 4 else gptq_v2.NAME


def compressed_tensors_of(activations: object) -> str:
    """The layout of compressed-tensors with integer weights; activations: how runtimes round inputs, `activation_bits`."""
    if activations == "fp8":
        return pack_quantized.W4AFP8.name
    return int_quantized.NAME if activations else pack_quantized.NAME


# (method, method.scheme) -> llm-compressor's preset
_PRESETS = {("fp8", "dynamic"): "FP8_DYNAMIC", ("fp8", "static"): "FP8", ("fp8", "block"): "FP8_BLOCK"}


def float_scheme(method: str, options: Mapping[str, Any]) -> FloatScheme | None:
    """The scheme of a method whose weights are floating-point codes; None for others."""
    name = str(options.get("scheme"))
    return SCHEMES.get(_PRESETS.get((method, name), name.upper()))


def schemes_of(method: str) -> tuple[str, ...]:
    """The values of `method.scheme` of a method whose weights are floating-point codes; none for others."""
    own = tuple(scheme for name, scheme in _PRESETS if name == method)
    return own or tuple(name.lower() for name in SCHEMES if re.fullmatch(rf"(nv|mx)?{method}(a16)?", name.lower()))


def own_width(method: str, options: Mapping[str, Any]) -> LinearSpec | None:
    """Bits and groups of a method that has them by itself (fp8, fp4, mxfp8; of most linears: gguf); None for others."""
    if method == planned.METHOD:
        return planned.usual(options)
    scheme = float_scheme(method, options)
    return None if scheme is None else LinearSpec(scheme.bits, scheme.group_size)


def own_widths(
    method: str, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, LinearSpec] | None:
    """What a method that decides about every weight matrix by itself makes of each (gguf); None for others.

    shapes: (out_features, in_features) of all of them, by module, embeddings and output layer included.
    """
    return planned.specs(options, shapes, config) if method == planned.METHOD else None


def types_note(
    method: str, options: Mapping[str, Any], widths: Mapping[str, LinearSpec], shapes: Mapping[str, tuple[int, int]]
) -> str:
    """Which types a method that decides by itself gives the linears, in words; empty for other methods."""
    return planned.summary(options, widths, shapes) if method == planned.METHOD and widths else ""


def runtime_of(method: str) -> str:
    """The server that reads what a method makes: `vllm`, or `llamacpp` for GGUF files."""
    return gguf.LAYOUT.runtime if method == planned.METHOD else "vllm"


def rounds_inputs(method: str, options: Mapping[str, Any]) -> bool:
    """Whether runtimes round the inputs of linears, too."""
    scheme = float_scheme(method, options)
    return bool(options.get("activation_bits")) or (scheme is not None and scheme.activations is not None)


def fixed_inputs(method: str, options: Mapping[str, Any]) -> bool:
    """Whether the inputs of linears get scales that are fixed before, which calibration finds."""
    scheme = float_scheme(method, options)
    return scheme is not None and scheme.activations is not None and bool(scheme.activations.tensor)


def written_by(backend: str, method: str, options: Mapping[str, Any], specs: set[LinearSpec], symmetric: bool) -> str:
    """The layout of a backend's output."""
    if method == "bnb":
        return bitsandbytes.NAME
    if method == planned.METHOD:
        return gguf.NAME
    scheme = float_scheme(method, options)
    if scheme is not None:
        return scheme.layout
    if backend == "llmcompressor":
        return compressed_tensors_of(options.get("activation_bits"))
    if backend == "native":
        return layout_of(specs, symmetric)
    version = str(options.get("version"))
    return awq.VERSIONS.get(version, awq.VERSIONS["gemm"]) if method == "awq" else gptq.NAME


def converted(
    layout: Layout, target: str, specs: Collection[LinearSpec], *, symmetric: bool, reordered: bool = False
) -> Layout:
    """What a conversion makes of a layout; `auto` keeps layouts that vLLM reads and converts others to the nearest one.

    Args:
        layout: of the source.
        target: `convert.target`: auto, keep or a key of `TARGETS`.
        specs: bits and groups of its linears.
        symmetric: its config promises that every zero point is the middle one.
        reordered: groups are not runs of consecutive columns.
    """
    if target == "keep":
        return layout
    if target != "auto":
        return TARGETS[target]
    nearest = layout.nearest(specs, symmetric, reordered)
    return layout if nearest is None else LAYOUTS[nearest]
