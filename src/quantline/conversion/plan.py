"""Plan a conversion from headers, scales and zero points, and collect all reasons against it.

Nothing is written before `make_plan` has returned. Faults of all linears and tensors are raised as one error, since a
checkpoint that fails for one reason often fails for several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from quantline.checkpoints.float_view import is_cache_scale
from quantline.checkpoints.layouts import FormatError, Layout, round_scales
from quantline.checkpoints.layouts.description import Description
from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.checkpoints.linears import exempt, is_wide, modules_left, numbered
from quantline.checkpoints.quantization_config import LayerSettings, section_of
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.conversion.errors import ConversionError
from quantline.conversion.facts import LayerFacts, scale_loss
from quantline.conversion.source import Source, SourceLayer
from quantline.conversion.targets import casts_scales, checkpoint_faults, target_faults, tensor_specs, weights_stem


@dataclass(frozen=True)
class Shard:
    """One output file: its linears, the tensors carried over (output name -> source name), and all tensors' specs."""

    name: str
    layers: tuple[str, ...]
    carried: Mapping[str, str]
    specs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion without faults. settings: the quantization_config; empty for layouts that have none."""

    source: Source
    layout: Layout
    shards: tuple[Shard, ...]
    index_name: str
    facts: Mapping[str, LayerFacts]
    settings: Mapping[str, Any]
    zero_points: bool
    cast_scales: bool
    requantize: bool
    warnings: tuple[str, ...]


def examine(
    source: Source, layout: Layout, *, requantize: bool, threads: int = 2
) -> tuple[dict[str, LayerFacts], list[str]]:
    """Facts of every linear, and the faults of those that cannot be read or whose scales cannot be cast."""
    half = casts_scales(source, layout)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda layer: _examine(source, layer, half, requantize), source.layers.values()))
    facts = {
        name: outcome for name, outcome in zip(source.layers, found, strict=True) if isinstance(outcome, LayerFacts)
    }
    return facts, [fault for outcome in found if isinstance(outcome, list) for fault in outcome]


def _examine(source: Source, layer: SourceLayer, half: bool, requantize: bool) -> LayerFacts | list[str]:
    faults = []
    try:
        source.check_codes(layer)
    except FormatError as error:
        faults.append(f"{layer.name}: {error}")
    try:
        if layer.layout.affine is None:  # kept as it is, so it only has to be readable
            source.check_weights(layer)
            return LayerFacts(True, True, 0, 0.0, "F32")
        linear, outliers = source.outline(layer, requantize)
    except FormatError as error:
        return [*faults, f"{layer.name}: {error}"]
    loss, dtype = 0.0, {2: "F16", 4: "F32"}[linear.scales.dtype.itemsize]
    if half and dtype == "F32":
        try:
            loss = scale_loss(linear, round_scales(linear))
        except FormatError as error:
            return [*faults, f"{layer.name}.{source.scale_suffix}: {error}; compressed_tensors keeps float32"]
        dtype = "F16"
    return faults or LayerFacts(linear.symmetric, linear.sequential, int(linear.zeros.min()), loss, dtype, outliers)


def make_plan(
    source: Source, layout: Layout, *, requantize: bool = False, shard_bytes: int = 4 * 10**9
) -> ConversionPlan:
    """The plan of everything that will be written.

    Raises:
        ConversionError: all reasons against it.
    """
    source = _without_cache_scales(source)
    faults = [*source.faults, *checkpoint_faults(layout, source)]
    facts, unreadable = examine(source, layout, requantize=requantize)
    faults += unreadable
    for name, layer in source.layers.items():
        faults += [f"{name}: {fault}" for fault in target_faults(layout, layer, facts.get(name))]
    shared: Counter[tuple[int, int]] = Counter((layer.bits, layer.group_size) for layer in source.layers.values())
    if len(shared) > 1 and not layout.mixed_target:
        kinds = ", ".join(
            f"{count} of {bits} bits in groups of {size}" for (bits, size), count in sorted(shared.items())
        )
        faults.append(f"its linears are of several kinds ({kinds}), but {layout.name} has one; use compressed_tensors")
    if faults or not facts:
        raise ConversionError(faults or ["it holds no quantized linear; give a quantized checkpoint"])
    symmetric = all(fact.symmetric for fact in facts.values())
    (bits, group_size), _ = shared.most_common(1)[0]
    overrides = {
        name: LayerSettings(layer.bits, layer.group_size, symmetric)
        for name, layer in source.layers.items()
        if (layer.bits, layer.group_size) != (bits, group_size)
    }
    settings: dict[str, Any] = {}
    if layout.config is not None:
        settings = section_of(layout.name, Description(
            LayerSettings(bits, group_size, symmetric), any(not fact.sequential for fact in facts.values()),
            tuple(_left_float(source, layout)), overrides, quantized_head=LM_HEAD in source.layers,
        ))  # fmt: skip
    return ConversionPlan(
        source=source, layout=layout, facts=facts, settings=settings, zero_points=not symmetric, requantize=requantize,
        shards=tuple(_shards(source, layout, facts, not symmetric, shard_bytes)),
        index_name=f"{weights_stem(layout, source)}.safetensors.index.json",
        cast_scales=casts_scales(source, layout), warnings=tuple(_warnings(source, layout, facts)),
    )  # fmt: skip


def _without_cache_scales(source: Source) -> Source:
    """The source without the scales of a KV cache, since the description that is written says nothing of a cache."""
    scales = {old for name, old in source.carried.items() if is_cache_scale(name)}
    why = dict.fromkeys(scales, "a scale of the KV cache, which only a checkpoint that is kept has")
    carried = {name: old for name, old in source.carried.items() if old not in scales}
    return replace(source, carried=carried, left_out={**source.left_out, **why})


def _left_float(source: Source, layout: Layout) -> list[str]:
    stacks = [name.removesuffix(".weight") for name, old in source.carried.items() if _is_stack(source, old)]
    floats = [*source.float_linears, *stacks]
    tied = layout.config is not None and layout.config.names_tied_head
    if tied and LM_HEAD not in (*source.layers, *floats):
        floats.append(LM_HEAD)
    return modules_left(floats, source.layers)


def _is_stack(source: Source, name: str) -> bool:
    """Whether a carried tensor is one of all experts of a layer."""
    shape, place = source.tensors.infos[name].shape, numbered(name)
    return len(shape) > 2 and is_wide(shape) and place is not None and not exempt(place[2], shape)


def _warnings(source: Source, layout: Layout, facts: Mapping[str, LayerFacts]) -> list[str]:
    notes = list(source.warnings)
    if source.info is not None and source.info.activation_bits is not None:
        notes.append("the source also rounds activations, to 8 bits a token; the result has its weights only")
    zero = sum(fact.least_zero == 0 for fact in facts.values())
    if layout.zero_hazard and zero:
        notes.append(f"{zero} linears have a zero point of 0, {layout.zero_hazard}")
    coarse = sum(fact.scale_loss > 2.0**-11 for fact in facts.values())
    if coarse:
        notes.append(f"{coarse} linears have scales below the normal range of float16, rounded by more than 2**-11")
    return notes


def _shards(
    source: Source, layout: Layout, facts: Mapping[str, LayerFacts], zero_points: bool, limit: int
) -> list[Shard]:
    """Tensors in the order of the source; a new file starts when the next linear or tensor would exceed the limit."""
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
    stem = weights_stem(layout, source)
    names = (
        [f"{stem}.safetensors"]
        if len(files) == 1
        else [f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    )
    return [Shard(name, tuple(file[0]), *file[1:]) for name, file in zip(names, files, strict=True)]
