"""What a conversion will write, decided from headers, scales and zero points; and everything that speaks against it.

Nothing is written before `make_plan` has returned. Faults are gathered over all linears and tensors and raised as one
error, since a checkpoint that fails for one reason often fails for several.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantline.conversion.faults import ConversionError
from quantline.conversion.source import Source, SourceLayer
from quantline.errors import UserError
from quantline.formats import FormatError, QuantizedLinear, round_scales
from quantline.formats.settings import LayerSettings, describe
from quantline.formats.streaming import TensorSpec

# Layouts whose readers keep scales in float16; compressed-tensors holds them as they are.
HALF_SCALES = ("awq_gemm", "awq_gemv", "gptq", "gptq_v2")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class LayerFacts:
    """What a linear's scales and zero points say.

    symmetric: every zero point is the middle one. sequential: groups are consecutive columns. least_zero: its smallest
    zero point. scale_loss: the largest relative change of a scale by the cast to float16. outliers: groups that have to
    be quantized again.
    """

    symmetric: bool
    sequential: bool
    least_zero: int
    scale_loss: float
    scale_dtype: str
    outliers: int = 0


@dataclass(frozen=True)
class Shard:
    """One output file: its linears, the tensors carried over (output name -> source name), and all tensors' specs."""

    name: str
    layers: tuple[str, ...]
    carried: Mapping[str, str]
    specs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Plan:
    """A conversion that nothing speaks against."""

    source: Source
    layout: str
    shards: tuple[Shard, ...]
    facts: Mapping[str, LayerFacts]
    settings: Mapping[str, Any]
    zero_points: bool
    cast_scales: bool
    requantize: bool
    warnings: tuple[str, ...]


def examine(
    source: Source, layout: str, *, requantize: bool, threads: int = 2
) -> tuple[dict[str, LayerFacts], list[str]]:
    """Facts of every linear, and the faults of those that cannot be read or whose scales cannot be cast."""
    half = casts_scales(source, layout)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda layer: _examine(source, layer, half, requantize), source.layers.values()))
    facts = {
        name: outcome for name, outcome in zip(source.layers, found, strict=True) if isinstance(outcome, LayerFacts)
    }
    return facts, [outcome for outcome in found if isinstance(outcome, str)]


def casts_scales(source: Source, layout: str) -> bool:
    """Whether scales become float16: where the layout's readers want that and the source is not already theirs."""
    return layout in HALF_SCALES and family(source.layout) != family(layout)


def family(layout: str) -> str:
    """awq, gptq, compressed or msmodelslim."""
    return layout.split("_", maxsplit=1)[0]


def _examine(source: Source, layer: SourceLayer, half: bool, requantize: bool) -> LayerFacts | str:
    try:
        linear, outliers = source.outline(layer, requantize)
    except FormatError as error:
        return f"{layer.name}: {error}"
    loss, dtype = 0.0, {2: "F16", 4: "F32"}[linear.scales.dtype.itemsize]
    if half and dtype == "F32":
        try:
            loss = scale_loss(linear, round_scales(linear))
        except FormatError as error:
            return f"{layer.name}.{source.scale_suffix}: {error}; compressed_tensors keeps float32"
        dtype = "F16"
    return LayerFacts(linear.symmetric, linear.sequential, int(linear.zeros.min()), loss, dtype, outliers)


def scale_loss(before: QuantizedLinear, after: QuantizedLinear) -> float:
    """The largest relative change of a scale, and so of any weight, since ``w = (u - z) * s``."""
    old, new = before.scales.astype(np.float64), after.scales.astype(np.float64)
    change = np.divide(np.abs(new - old), np.abs(old), out=np.zeros_like(old), where=old != 0)
    return float(change.max(initial=0.0))


def make_plan(source: Source, layout: str, *, requantize: bool = False, shard_bytes: int = 4 * 10**9) -> Plan:
    """Everything that will be written.

    Raises:
        ConversionError: all that speaks against it.
    """
    faults = list(source.faults)
    facts, unreadable = examine(source, layout, requantize=requantize)
    faults += unreadable
    for name, layer in source.layers.items():
        faults += [f"{name}: {fault}" for fault in target_faults(layout, layer, facts.get(name))]
    shared: Counter[tuple[int, int]] = Counter((layer.bits, layer.group_size) for layer in source.layers.values())
    if len(shared) > 1 and layout != "compressed_tensors":
        kinds = ", ".join(
            f"{count} of {bits} bits in groups of {size}" for (bits, size), count in sorted(shared.items())
        )
        faults.append(f"its linears are of several kinds ({kinds}), {layout} has one; use compressed_tensors")
    if faults or not facts:
        raise ConversionError(faults or ["it holds no quantized linear; give a quantized checkpoint"])
    symmetric = all(fact.symmetric for fact in facts.values())
    (bits, group_size), _ = shared.most_common(1)[0]
    overrides = {
        name: LayerSettings(layer.bits, layer.group_size, symmetric)
        for name, layer in source.layers.items()
        if (layer.bits, layer.group_size) != (bits, group_size)
    }
    settings = describe(
        layout, bits=bits, group_size=group_size, symmetric=symmetric,
        desc_act=any(not fact.sequential for fact in facts.values()), modules_to_not_convert=source.float_linears,
        overrides=overrides or None,
    )  # fmt: skip
    return Plan(
        source=source, layout=layout, facts=facts, settings=settings, zero_points=not symmetric, requantize=requantize,
        shards=tuple(_shards(source, layout, facts, not symmetric, shard_bytes)),
        cast_scales=casts_scales(source, layout), warnings=tuple(_warnings(source, layout, facts)),
    )  # fmt: skip


def target_faults(layout: str, layer: SourceLayer, facts: LayerFacts | None) -> list[str]:
    """What a layout cannot hold of one linear."""
    faults = []
    awq, gptq = family(layout) == "awq", family(layout) == "gptq"
    if awq and layer.bits != 4:
        faults.append(f"has {layer.bits} bits, AWQ holds 4; use gptq or compressed_tensors")
    if awq and facts is not None and not facts.sequential:
        faults.append("groups are reordered by activation (desc_act), which AWQ cannot hold; use gptq")
    run = 8 if awq else 32 // np.gcd(32, layer.bits) if gptq else 1
    for name, width in (("in_features", layer.in_features), ("out_features", layer.out_features)):
        if width % run:
            remedy = "use compressed_tensors, or leave it in float"
            faults.append(f"{name}={width} does not fill whole words of {layout}, a multiple of {run} does; {remedy}")
    return faults


def _warnings(source: Source, layout: str, facts: Mapping[str, LayerFacts]) -> list[str]:
    notes = list(source.warnings)
    zero = sum(fact.least_zero == 0 for fact in facts.values())
    if layout == "gptq" and zero:
        notes.append(f"{zero} linears have a zero point of 0, which some readers of gptq mistake; gptq_v2 is safe")
    coarse = sum(fact.scale_loss > 2.0**-11 for fact in facts.values())
    if coarse:
        notes.append(f"{coarse} linears have scales below the normal range of float16, rounded by more than 2**-11")
    return notes


def tensor_specs(layout: str, layer: SourceLayer, facts: LayerFacts, zero_points: bool) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of a linear, by suffix, as the layout's `write` gives them; the bias is carried."""
    rows, columns, bits = layer.in_features, layer.out_features, layer.bits
    groups = 1 if layer.group_size == -1 else rows // layer.group_size
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


def _shards(source: Source, layout: str, facts: Mapping[str, LayerFacts], zero_points: bool, limit: int) -> list[Shard]:
    """Tensors in the order of the source, a new file wherever the next linear or tensor would exceed the limit."""
    files: list[tuple[list[str], dict[str, str], dict[str, TensorSpec]]] = []
    filled = 0
    for output, name in source.order():
        if name is None:
            made = tensor_specs(layout, source.layers[output], facts[output], zero_points)
            specs = {f"{output}.{suffix}": spec for suffix, spec in made.items()}
        else:
            info = source.tensors.infos[name]
            specs = {output: TensorSpec(info.dtype, info.shape)}
        size = sum(spec.nbytes for spec in specs.values())
        if not files or (filled and filled + size > limit):
            files.append(([], {}, {}))
            filled = 0
        layers, carried, held = files[-1]
        layers.extend([output] if name is None else [])
        carried.update({} if name is None else {output: name})
        held.update(specs)
        filled += size
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    )
    return [Shard(name, tuple(file[0]), *file[1:]) for name, file in zip(names, files, strict=True)]


def parse_size(text: str) -> int:
    """Bytes of `4GB`, `500 MB`, `2GiB`.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    factor = _UNITS.get(match.group(2).upper()) if match else None
    size = int(float(match.group(1)) * factor) if match and factor else 0
    if size < 1:
        raise UserError(f"convert.shard_size={text}: give a size such as 4GB or 500MB")
    return size
