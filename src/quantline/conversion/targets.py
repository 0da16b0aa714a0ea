"""What a target's layout can hold of a source, and the names of its files."""

from __future__ import annotations

from quantline.checkpoints.layouts import Layout, Storage
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.conversion.facts import LayerFacts
from quantline.conversion.source import Source, SourceLayer


def casts_scales(source: Source, layout: Layout) -> bool:
    """Whether scales become float16: the layout's readers need that, and the source is not of the same method."""
    return layout.affine is not None and layout.affine.half_scales and source.layout.method != layout.method


def weights_stem(layout: Layout, source: Source) -> str:
    """The file name of the weights, without the suffixes of shards and index."""
    return "model" if layout.folder is None else layout.folder.stem(layer.bits for layer in source.layers.values())


def checkpoint_faults(layout: Layout, source: Source) -> list[str]:
    """Tensors outside the linears that a layout cannot hold."""
    if layout.folder is None:
        return []
    return layout.folder.carried_faults({name: source.tensors.infos[old].shape for name, old in source.carried.items()})


def target_faults(layout: Layout, layer: SourceLayer, facts: LayerFacts | None) -> list[str]:
    """Reasons why a layout cannot hold a linear."""
    storage = Storage(sequential=facts is None or facts.sequential)
    return [str(fault) for fault in layout.faults(layer.shape, layer.spec, storage)]


def tensor_specs(layout: Layout, layer: SourceLayer, facts: LayerFacts, zero_points: bool) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of a linear, by suffix; the bias is carried."""
    return layout.specs(layer.shape, layer.spec, Storage(facts.scale_dtype, zero_points, facts.sequential))
