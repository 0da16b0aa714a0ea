"""What the layouts that can be written hold, which tensors they make of a linear, and how their files are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from quantline.checkpoints.layouts import LAYOUTS, Layout
from quantline.checkpoints.layouts.msmodelslim import codec, files
from quantline.checkpoints.layouts.registry import HALF_SCALES, MSMODELSLIM, MSMODELSLIM_PACKED, _MsModelSlim, family
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.conversion.source import Source, SourceLayer

if TYPE_CHECKING:
    from quantline.conversion.facts import LayerFacts

# convert.target -> layout
TARGETS = {
    "awq": "awq_gemm", "gptq": "gptq", "gptq_v2": "gptq_v2", "compressed_tensors": "compressed_tensors",
    MSMODELSLIM: MSMODELSLIM, MSMODELSLIM_PACKED: MSMODELSLIM_PACKED,
}  # fmt: skip


# Everything that can be written, and read back.
FORMS: dict[str, Layout] = {
    **LAYOUTS,
    MSMODELSLIM: _MsModelSlim(MSMODELSLIM, False),
    MSMODELSLIM_PACKED: _MsModelSlim(MSMODELSLIM_PACKED, True),
}


def casts_scales(source: Source, layout: str) -> bool:
    """Whether scales become float16: where the layout's readers want that and the source is not already theirs."""
    return layout in HALF_SCALES and family(source.layout) != family(layout)


def save_mode(layout: str) -> str:
    """The save mode of a msModelSlim layout."""
    return files.ASCEND_V1 if layout == MSMODELSLIM_PACKED else files.SAFE_TENSOR


def weights_stem(layout: str, source: Source) -> str:
    """The name of the weights, without what shards and indexes add to it."""
    if family(layout) == MSMODELSLIM:
        return files.stem_of((layer.bits for layer in source.layers.values()), save_mode(layout))
    return "model"


def checkpoint_faults(layout: str, source: Source) -> list[str]:
    """What a layout cannot hold of the tensors outside the linears."""
    if family(layout) != MSMODELSLIM:
        return []
    vectors = {name for name, old in source.carried.items() if len(source.tensors.infos[old].shape) == 1}
    return [
        f"{name}: is the bias of a norm, which msModelSlim's readers take for one of anti-outlier m3 and leave out; "
        "use gptq or compressed_tensors"
        for name in source.carried
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in vectors
    ]


def target_faults(layout: str, layer: SourceLayer, facts: LayerFacts | None) -> list[str]:
    """What a layout cannot hold of one linear."""
    faults = []
    kind = family(layout)
    holds = {"awq": ("AWQ", (4,)), MSMODELSLIM: ("msModelSlim", codec.BITS)}.get(kind)
    if holds is not None:
        called, bits = holds
        others = "gptq or compressed_tensors"
        if layer.bits not in bits:
            faults.append(f"has {layer.bits} bits, {called} holds {' and '.join(map(str, bits))}; use {others}")
        if facts is not None and not facts.sequential:
            remedy = "use gptq" if kind == "awq" else f"use {others}"
            faults.append(f"groups are reordered by activation (desc_act), which {called} cannot hold; {remedy}")
    for name, width, run in _words(layout, layer):
        if width % run:
            remedy = "use compressed_tensors, or leave it in float"
            faults.append(f"{name}={width} does not fill whole words of {layout}, a multiple of {run} does; {remedy}")
    return faults


def _words(layout: str, layer: SourceLayer) -> Iterable[tuple[str, int, int]]:
    """Widths that are packed, and how many values fill a word."""
    widths = {"in_features": layer.in_features, "out_features": layer.out_features}
    kind = family(layout)
    if layout == MSMODELSLIM_PACKED and layer.bits == 4:
        name = "in_features" if groups_of(layer) == 1 else "out_features"
        return [(name, widths[name], 2)]
    run = 8 if kind == "awq" else int(32 // np.gcd(32, layer.bits)) if kind == "gptq" else 1
    return [(name, width, run) for name, width in widths.items()]


def groups_of(layer: SourceLayer) -> int:
    """Groups along the input."""
    return 1 if layer.group_size == -1 else layer.in_features // layer.group_size


def tensor_specs(layout: str, layer: SourceLayer, facts: LayerFacts, zero_points: bool) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of a linear, by suffix, as the layout's `write` gives them; the bias is carried."""
    rows, columns, bits, groups = layer.in_features, layer.out_features, layer.bits, groups_of(layer)
    if layout == "awq_gemm":
        return {
            "qweight": TensorSpec("I32", (rows, columns // 8)),
            "qzeros": TensorSpec("I32", (groups, columns // 8)),
            "scales": TensorSpec("F16", (groups, columns)),
        }
    if layout in ("gptq", "gptq_v2"):
        return {
            "qweight": TensorSpec("I32", (rows * bits // 32, columns)),
            "qzeros": TensorSpec("I32", (groups, columns * bits // 32)),
            "scales": TensorSpec(facts.scale_dtype, (groups, columns)),
            "g_idx": TensorSpec("I32", (rows,)),
        }
    if family(layout) == MSMODELSLIM:
        packed = layout == MSMODELSLIM_PACKED and bits == 4
        along_in = packed and groups == 1
        codes = (columns // (2 if packed and not along_in else 1), rows // (2 if along_in else 1))
        scale = TensorSpec(facts.scale_dtype, (columns, groups))
        return {"weight": TensorSpec("I8", codes), "weight_scale": scale, "weight_offset": scale}
    per_word = 32 // bits
    specs = {
        "weight_packed": TensorSpec("I32", (columns, -(-rows // per_word))),
        "weight_scale": TensorSpec(facts.scale_dtype, (columns, groups)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    if zero_points:
        specs["weight_zero_point"] = TensorSpec("I32", (-(-columns // per_word), groups))
    if not facts.sequential:
        specs["weight_g_idx"] = TensorSpec("I32", (rows,))
    return specs
