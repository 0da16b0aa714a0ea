"""Known reasons against serving a converted checkpoint, reported before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantline.checkpoints.layouts import Layout
from quantline.checkpoints.model_config import dimensions
from quantline.checkpoints.quantization_config import LayerSettings
from quantline.conversion.errors import ConversionError
from quantline.conversion.facts import LayerFacts
from quantline.conversion.source import Source
from quantline.serving.checkpoint_facts import facts_of_layers, fused_apart
from quantline.serving.rules import CheckpointFacts, Ruling, Target, architecture_of, serving_dtype, verdicts

# The most linears that a note names; a model has hundreds.
_NAMED = 8


def serving_notes(
    target: Target,
    source: Source,
    layout: Layout,
    settings: Mapping[str, Any],
    facts: Mapping[str, LayerFacts],
    *,
    must_serve: bool,
) -> list[str]:
    """Reasons why the target will not load the result, and changes that the target makes to it while loading.

    Args:
        target: the target that should serve it.
        source: the checkpoint.
        layout: the layout of the result.
        settings: the quantization_config of the result.
        facts: the facts about its linears.
        must_serve: raise the reasons instead of returning them.

    Raises:
        ConversionError: there are reasons, and `must_serve` is set.
    """
    linears = _settings_of(source, layout, facts)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in source.layers.items()}
    for name in source.float_linears:
        out_features, in_features = source.tensors.infos[source.carried[f"{name}.weight"]].shape
        shapes[name] = (in_features, out_features)
    if layout.config is None:
        known = [CheckpointFacts(layout.method)]
    else:
        known = facts_of_layers(
            settings, linears, shapes, heads=dimensions(source.config).heads,
            tensor_parallel_size=target.tensor_parallel_size,
        )  # fmt: skip
    architecture = architecture_of(source.config)
    target = replace(target, dtype=serving_dtype(target.dtype, quantized=True, architecture=architecture))
    apart = [name for names in fused_apart(linears, shapes) for name in names]
    where = f"{target.runtime} {target.version} on {target.device}"
    against = [
        f"{where} will not serve it: {found.reason}{_named(found, apart)}; {found.remedy}"
        for one in known for found in verdicts(target, replace(one, architecture=architecture))
    ]  # fmt: skip
    against = list(dict.fromkeys(against))
    if against and must_serve:
        raise ConversionError([f"convert.for={target.runtime}: {note}" for note in against])
    wide = sum(fact.scale_dtype == "F32" for fact in facts.values())
    if wide and layout.affine is not None and layout.affine.casts_at_loading:
        against.append(f"{where} rounds scales to the dtype that it computes in; {wide} linears have float32 scales")
    return against


def _settings_of(source: Source, layout: Layout, facts: Mapping[str, LayerFacts]) -> dict[str, LayerSettings]:
    if layout is source.layout and source.info is not None:
        return {name: source.info.of(name) for name in source.layers}
    symmetric = all(fact.symmetric for fact in facts.values())
    return {name: LayerSettings(one.bits, one.group_size, symmetric) for name, one in source.layers.items()}


def _named(found: Ruling, apart: Sequence[str]) -> str:
    if found.rule_id != "fused-layers-differ":
        return ""
    more = f" and {len(apart) - _NAMED} more" if len(apart) > _NAMED else ""
    return f" ({', '.join(apart[:_NAMED])}{more})"
