"""The block type of every linear of a float model, before it is quantized: from names, shapes and config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES
from quantline.checkpoints.layouts.gguf.layout import spec_of
from quantline.checkpoints.layouts.gguf.mixtures import MIXTURES, Traits, types
from quantline.checkpoints.layouts.gguf.names import MODEL_TYPES, stored_name
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.model_config import dimensions

METHOD = "gguf"


def usual(options: Mapping[str, Any]) -> LinearSpec:
    """Bits and groups of most linears of the mixture that `method.type` names."""
    return spec_of(MIXTURES[str(options["type"])][1])


def summary(options: Mapping[str, Any], chosen: Mapping[str, LinearSpec], shapes: Mapping[str, tuple[int, int]]) -> str:
    """The types of a model's linears and their bits a weight, in words.

    shapes: (in_features, out_features) of every linear.
    """
    counted = Counter(one.kind.upper() for one in chosen.values())
    listed = ", ".join(f"{count} x {kind}" for kind, count in counted.most_common())
    sizes = {name: shapes[name][0] * shapes[name][1] for name in chosen}
    bits = sum(BLOCK_TYPES[one.kind.upper()].bits_per_weight * sizes[name] for name, one in chosen.items())
    return (
        f"{options['type']} is {listed} in this model's linears, {bits / max(sum(sizes.values()), 1):.2f} bits a weight"
    )


def specs(
    options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> dict[str, LinearSpec]:
    """What a mixture makes of a model.

    Args:
        options: of the method: `type` and `imatrix`.
        shapes: (out_features, in_features) of every weight matrix, by module, embeddings and output layer included, that
            one only where it has a tensor of its own.
        config: the model's config.json.

    Returns:
        module -> spec. Modules whose rows no block fits stay in float and are left out, and so are those of families that
        are not known.
    """
    architecture = MODEL_TYPES.get(str(config.get("model_type")))
    if architecture is None:
        return {}
    numbers = dimensions(config)
    traits = Traits(
        architecture,
        numbers.layers or 0,
        numbers.heads or 0,
        numbers.kv_heads or 0,
        imatrix=bool(options.get("imatrix")),
    )
    stored = {stored_name(architecture, module): module for module in shapes}
    known = {name: shapes[module] for name, module in stored.items() if name is not None}
    return {
        stored[name]: spec_of(kind)
        for name, kind in types(str(options["type"]), known, traits).items()
        if kind != "F16"
    }
