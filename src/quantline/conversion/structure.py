"""What a checkpoint's tensors must be by its own evidence: names, shapes and dtypes, without the model's code.

A loader passes over a tensor whose name it does not know, and fills the one that it misses with something else. So a tensor
that was renamed or reshaped makes another model of the same name. `contradictions` finds that from config.json and from
what the other tensors are: layers of one kind are alike, embeddings, norms and output layer have the widths of the config.
Only families that backends claim (capabilities.yaml) are known well enough for that; of others, only what no model does is
refused. `quantline.conversion.architecture` asks the model's code instead, which knows all families and every tensor.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantline.checkpoints.float_view import is_cache_scale
from quantline.checkpoints.linears import place_of
from quantline.checkpoints.model_config import dimensions
from quantline.conversion.source import Source
from quantline.quantization.capabilities import claimed_families

_AGAIN = "fetch or write the checkpoint again"
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
_HALVES = {"F16", "BF16"}

# Modules outside the decoder layers of the claimed families, by their names below the module that holds the layers.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
NORMS = ("norm", "embedding_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
HEADS = ("lm_head", "embed_out")
OTHERS = (
    "wpe", "embed_positions", "project_in", "project_out", "word_embeddings_layernorm", "embed_tokens_per_layer",
    "per_layer_model_projection", "per_layer_projection_norm",
)  # fmt: skip
# Buffers that old libraries saved beside the parameters.
_BUFFERS = ("inv_freq", "masked_bias")
# Layers that predict further tokens, which transformers passes over: of Qwen3-Next by name, of GLM-4-MoE behind the others.
_PREDICTING = "mtp."
# Families whose layers differ, and the keys of config.json of which one must say how.
_SAYS_KINDS = {"lfm2": ("layer_types", "full_attn_idxs"), "gemma4_text": ("layer_types",)}


@dataclass(frozen=True)
class Held:
    """A tensor as the float model has it: its shape, its dtype, None for the weight of a quantized linear."""

    shape: tuple[int, ...]
    dtype: str | None


def held(source: Source) -> dict[str, Held]:
    """All tensors of a checkpoint by the names and shapes of the float model: a linear is (out_features, in_features).

    The scales of a KV cache are of no model.
    """
    found = {
        f"{layer.name}.weight": Held((layer.out_features, layer.in_features), None) for layer in source.layers.values()
    }
    for name, old in source.carried.items():
        if not is_cache_scale(name):
            found[name] = Held(source.tensors.infos[old].shape, source.tensors.infos[old].dtype)
    return found


def contradictions(source: Source) -> tuple[list[str], str | None]:
    """What in a checkpoint cannot be, and why its structure is not known; None if it is known."""
    faults, unknown = misfits(source.config, held(source))
    return [*faults, *_scales(source)], unknown


def misfits(config: Mapping[str, Any], tensors: Mapping[str, Held]) -> tuple[list[str], str | None]:
    """As `contradictions`, for a config.json and the tensors that `held` gives."""
    faults, unknown = [*_names(tensors), *_values(tensors)], _unknown(config)
    return faults or ([] if unknown else _family(config, tensors)), unknown


def _unknown(config: Mapping[str, Any]) -> str | None:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in claimed_families():
        return f"layers of model_type={family!r} are not known to be alike"
    numbers = dimensions(config)
    if None in (numbers.layers, numbers.hidden, numbers.vocabulary):
        return "config.json lacks the number of layers, their width or the size of the vocabulary"
    needed = _SAYS_KINDS.get(family, ())
    if needed and not any(isinstance(config.get(key), list) for key in needed):
        return f"config.json lacks {' and '.join(needed)}, by which the layers of {family} differ"
    return None


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def _names(tensors: Iterable[str]) -> list[str]:
    return [f"{name!r}: is no name of a parameter; {_AGAIN}" for name in tensors if not _NAME.fullmatch(name)]


def _values(tensors: Mapping[str, Held]) -> list[str]:
    """Weights and biases that are no floats, and biases that are not one value for each output of their linear."""
    faults = []
    for name, one in tensors.items():
        module, _, suffix = name.rpartition(".")
        owner = tensors.get(f"{module}.weight")
        if suffix == "bias" and owner is not None and owner.dtype is None and one.shape != owner.shape[:1]:
            faults.append(f"{name}: has shape {one.shape}, its linear has {owner.shape[0]} outputs; {_AGAIN}")
        vector = len(one.shape) == 1
        if one.dtype not in (None, *_FLOATS) and (suffix == "weight" or (suffix == "bias" and vector)):
            faults.append(f"{name}: is stored as {one.dtype}, but parameters are floating-point; {_AGAIN}")
    return faults


def _scales(source: Source) -> list[str]:
    """A scale or zero point of another 16-bit float than those of all other linears; bits read as the other mean nothing."""
    dtypes: dict[str, dict[str, str]] = defaultdict(dict)
    for layer in source.layers.values():
        for suffix, name in layer.tensors.items():
            dtypes[suffix][name] = source.tensors.infos[name].dtype
    return [fault for own in dtypes.values() for fault in _mixed(own)]


def _mixed(dtypes: Mapping[str, str | None]) -> list[str]:
    counts = Counter(dtype for dtype in dtypes.values() if dtype in _HALVES)
    if len(counts) < 2:
        return []
    (usual, many), (rare, few) = counts.most_common()
    name = next(name for name, dtype in dtypes.items() if dtype == rare)
    return [
        f"{name}: is stored as {rare}, as {few} of {few + many} tensors of its kind are, the others as {usual}: a header "
        "that was changed reads like this; save all of them in one dtype"
    ]


def _family(config: Mapping[str, Any], tensors: Mapping[str, Held]) -> list[str]:
    family, count = config["model_type"], dimensions(config).layers or 0
    layers: dict[int, dict[str, Held]] = defaultdict(dict)
    outside: dict[str, Held] = {}
    stacks: set[str] = set()
    further = range(count, count + (_size(config, "num_nextn_predict_layers") or 0))
    for name, one in tensors.items():
        number, rest = place_of(name)
        if name.startswith(_PREDICTING) or number in further:
            continue
        if number < 0:
            outside[name] = one
        else:
            layers[number][rest] = one
            stacks.add(name.removesuffix(f"{number}.{rest}"))
    if len(stacks) != 1:
        return [f"decoder layers are named {' and '.join(sorted(stacks)) or 'nowhere'}, but a {family} has them once"]
    if len(layers) != count or max(layers) >= count:
        return [f"layer {max(layers)}: config.json names {count} layers, the tensors are of {len(layers)}; {_AGAIN}"]
    prefix = next(iter(stacks)).removesuffix(".").rpartition(".")[0]
    faults = _outside(config, outside, f"{prefix}." if prefix else "")
    faults += _alike(family, [layers[number] for number in range(count)], _kinds(config, count))
    if faults:
        return faults
    # GPTQModel keeps biases of the linears that it packs in float16 beside a bfloat16 model.
    packed = {name for name in tensors if _of_packed(tensors, name)}
    groups = (packed, tensors.keys() - packed)
    return [fault for own in groups for fault in _mixed({name: tensors[name].dtype for name in tensors if name in own})]


def _outside(config: Mapping[str, Any], outside: Mapping[str, Held], prefix: str) -> list[str]:
    """Faults of the embeddings, the final norm, the output layer, and of tensors that are none of these."""
    family, numbers = config["model_type"], dimensions(config)
    rows, width = numbers.vocabulary, numbers.hidden
    inner = _size(config, "word_embed_proj_dim") or width
    known = [f"{prefix}{module}" for module in (*EMBEDDINGS, *NORMS, *OTHERS)] + [*HEADS]
    faults = [
        f"{name}: a {family} has no such tensor outside its layers; is it renamed? {_AGAIN}"
        for name in outside
        if not (name.removesuffix(".weight") in known or name.removesuffix(".bias") in known)
        and name.rpartition(".")[2] not in _BUFFERS
    ]
    # OPT-350m has no final norm; a tied output layer has no tensor of its own.
    normed = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm")
    roles: tuple[tuple[str, Sequence[str], tuple[int | None, ...], bool], ...] = (
        ("input embeddings", [f"{prefix}{name}" for name in EMBEDDINGS], (rows, inner), True),
        ("final norm", [f"{prefix}{name}" for name in NORMS], (width,), bool(normed)),
        ("output layer", HEADS, (rows, inner), config.get("tie_word_embeddings") is False),
    )
    for role, modules, shape, needed in roles:
        present = [module for module in modules if f"{module}.weight" in outside]
        if needed and not present:
            faults.append(f"{' or '.join(f'{module}.weight' for module in modules)}: is missing, the {role}; {_AGAIN}")
        for module in present:
            for name, wanted in ((f"{module}.weight", shape), (f"{module}.bias", shape[:1])):
                if name in outside and outside[name].shape != wanted:
                    faults.append(f"{name}: has shape {outside[name].shape}, config.json says {wanted}; {_AGAIN}")
    return faults


def _kinds(config: Mapping[str, Any], count: int) -> list[Hashable]:
    """A value for each layer, equal for layers that have the same tensors."""
    types = config.get("layer_types")
    full, dense = config.get("full_attn_idxs"), config.get("mlp_only_layers")
    step, shared = _size(config, "decoder_sparse_step") or 1, _size(config, "num_kv_shared_layers") or 0
    first = _size(config, "first_k_dense_replace") or 0
    return [
        (
            str(types[index]) if isinstance(types, list) and len(types) == count else None,  # whatever stands there
            isinstance(full, list) and index in full,
            (isinstance(dense, list) and index in dense) or (index + 1) % step != 0,
            index >= count - shared,
            index < first,
        )
        for index in range(count)
    ]  # fmt: skip


def _alike(family: str, layers: Sequence[Mapping[str, Held]], kinds: Sequence[Any]) -> list[str]:
    """Tensors that some layers of a kind have and others lack, or that they have in other shapes or dtypes."""
    faults = []
    for kind in dict.fromkeys(kinds):
        numbers = [number for number in range(len(layers)) if kinds[number] == kind]
        for name in dict.fromkeys(name for number in numbers for name in layers[number]):
            # Quantizers may add biases to the linears that they quantize, in another dtype; a rule may leave some float.
            packed = {number: _of_packed(layers[number], name) for number in numbers}
            for side in (True, False):
                fault = _odd_one({number: layers[number].get(name) for number in numbers if packed[number] is side})
                if fault:
                    number, fact = fault
                    faults.append(
                        f"layer {number}, {name}: {fact}; layers of a {family} are alike, so a tensor is renamed, lost or "
                        f"damaged; {_AGAIN}"
                    )
    return faults


def _of_packed(layer: Mapping[str, Held], name: str) -> bool:
    """Whether a tensor other than the weight is of a linear that is quantized in this layer."""
    module, _, suffix = name.rpartition(".")
    owner = layer.get(f"{module}.weight")
    return suffix != "weight" and owner is not None and owner.dtype is None


def _odd_one(found: Mapping[int, Held | None]) -> tuple[int, str] | None:
    """The first layer that differs from most others in having a tensor, or in its shape or dtype, and how."""
    lacking = [number for number, one in found.items() if one is None]
    having = {number: one for number, one in found.items() if one is not None}
    if lacking and having:
        if len(lacking) <= len(having):
            return lacking[0], f"is missing, layer {min(having)} has it"
        return min(having), f"is in {len(having)} layers, layer {lacking[0]} lacks it"
    facts: tuple[dict[int, Any], ...] = (
        {number: one.shape for number, one in having.items()},
        {number: one.dtype for number, one in having.items() if one.dtype is not None},
    )
    for what, values in zip(("shape", "dtype"), facts, strict=True):
        counts = Counter(values.values()).most_common()
        if len(counts) > 1:
            usual, rare = counts[0][0], counts[-1][0]
            first = {value: number for number, value in reversed(values.items())}
            return first[rare], f"has {what} {rare}, layer {first[usual]} has {usual}"
    return None
