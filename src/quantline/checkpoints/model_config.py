"""A model's config.json in the keys of transformers 4 and 5.

transformers 5 writes `rope_parameters` and `dtype` where 4.x reads `rope_theta`, `rope_scaling` and `torch_dtype`. The
old library silently ignores unknown keys and takes its defaults: it reads a model saved with a rotary base of 1e6 with
10000 (seen with 4.52.4). So a toolchain on transformers 4 gets a translated copy of the config, never the file itself,
and the result gets the source's config back.

Families have words of their own for the same number (`n_layer`, `d_model`). `dimensions` is the one place that knows
them. Standard library only.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError

# How transformers ends the names of models that predict the next token (all of AutoModelForCausalLM, 5.19).
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead", "GenerationDecoder")
# Types of models that take images, too, and that transformers (5.19) has no causal LM for. The reference engine builds them
# whole and gives them text. Each was run beside vLLM 0.32, see tests/serving/test_families_vllm.py. PaliGemma, Aria, Cohere2
# Vision, GLM-4V and Qwen3-VL-MoE were, too, and are left out: they end, or score otherwise than the engine.
WITH_IMAGES = frozenset(
    {
        "idefics3", "internvl", "lfm2_vl", "llama4", "llava", "llava_onevision", "mistral3", "qwen2_5_vl",
        "qwen2_vl", "qwen3_vl", "smolvlm",
    }
)  # fmt: skip
# Keys that do not affect what a model computes.
_NOT_COMPARED = frozenset(
    {"architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"}
)

# The words of the families, the usual one first: `attribute_map` of all causal language models of transformers 5.19. A
# dot goes into a section. A decoder's number comes before an encoder's.
_WORDS: dict[str, tuple[str, ...]] = {
    "layers": (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
    ),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads",
        "num_decoder_attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "attn_config.kv_n_heads"),
    "head_size": ("head_dim", "attention_head_dim", "kv_channels"),
    "hidden": ("hidden_size", "n_embd", "d_model", "emb_dim"),
    "inner": (
        "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "ffn_config.ffn_hidden_size",
        "moe_intermediate_size",
    ),
    "vocabulary": ("vocab_size", "n_words", "n_token"),
    "positions": (
        "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len", "model_max_length",
        "context_length",
    ),
    "experts": (
        "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts",
    ),
}  # fmt: skip
# Lists with one entry for each layer, for families that do not give the number itself (Nemotron-H).
_LAYER_LISTS = ("layers_block_type", "layer_types")
# Numbers of the attention cache, which all families call alike.
_CACHE_SIZES = ("sliding_window", "max_window_layers", "kv_lora_rank", "qk_rope_head_dim")


@dataclass(frozen=True)
class Dimensions:
    """A model's numbers, whatever its family calls them; None for what config.json does not say or the model has not.

    layers: decoder layers. heads, kv_heads: of attention, for queries and for keys and values. head_size: values of one
    head. hidden: width of the residual stream. inner: width inside the MLP; the widest, if layers differ. vocabulary:
    rows of the embedding. positions: the most tokens that it takes. experts: routed experts of a layer.
    """

    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    inner: int | None = None
    vocabulary: int | None = None
    positions: int | None = None
    experts: int | None = None


class ConfigTranslationError(UserError, ValueError):
    """The keys of transformers 4 cannot express this config."""


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: models with several parts keep it in `text_config`, over the keys of the whole."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embedding, so that a tensor of it in the files is a second name."""
    return bool(language_config(config).get("tie_word_embeddings"))


def why_not_causal(config: Mapping[str, Any]) -> str | None:
    """What a model is, by its config.json, if it is no causal LM; None if it is one.

    A server builds the class that `architectures` names, so a model without a head is refused there, even where its config
    and weights would make a causal LM.
    """
    named = config.get("architectures")
    if not config.get("model_type") or not named or not isinstance(named, list):
        return (
            "config.json has no model_type, or no architectures as a list of names, by which a server builds the model"
        )
    if not any(str(name).endswith(_CAUSAL) for name in named):
        return f"architectures in config.json names {', '.join(map(str, named))}, which is no causal LM"
    if config.get("is_encoder_decoder"):
        return f"{named[0]} is an encoder with a decoder (is_encoder_decoder in config.json), no causal LM"
    return None


def number_fault(config: Mapping[str, Any]) -> str | None:
    """Which number of a config.json is none, such as "6" in quotes, and what to do; None if there is none.

    transformers 5 refuses it, and older ones compute with it until something breaks.
    """
    own, text = language_config(config), config.get("text_config")
    for word in (*(one for words in _WORDS.values() for one in words), *_CACHE_SIZES):
        value = _value(own, word)
        entries = value if isinstance(value, list) else [value]
        # false says that there is none, as null does.
        if any(type(one) is not int and one is not None and one is not False for one in entries):
            inside = isinstance(text, Mapping) and word.partition(".")[0] in text
            return (
                f"config.json has {'text_config.' if inside else ''}{word}={json.dumps(value)[:60]}; it must be a whole "
                "number: correct it in a copy of the model, or fetch the model again"
            )
    return None


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """The numbers of a model's config.json, in the words of any family."""
    own = language_config(config)
    found = {key: next(filter(None, (_number(own, word) for word in words)), None) for key, words in _WORDS.items()}
    if found["layers"] is None:
        lists = [own[key] for key in _LAYER_LISTS if isinstance(own.get(key), list)]
        found["layers"] = len(lists[0]) or None if lists else None
    heads, hidden = found["heads"], found["hidden"]
    if own.get("multi_query") and not own.get("new_decoder_architecture"):
        found["kv_heads"] = 1  # Falcon and GPT-BigCode, whose other keys do not count then
    if heads and not found["kv_heads"]:
        found["kv_heads"] = heads
    if heads and hidden and not found["head_size"]:
        found["head_size"] = hidden // heads
    return Dimensions(**found)


def _number(config: Mapping[str, Any], word: str) -> int | None:
    """A positive whole number by its key; of a list with one for each layer, the largest."""
    value = _value(config, word)
    numbers = [one for one in (value if isinstance(value, list) else [value]) if type(one) is int and one > 0]
    return max(numbers, default=None)


def _value(config: Mapping[str, Any], word: str) -> Any:
    section, _, key = word.rpartition(".")
    place = config.get(section) if section else config
    return place.get(key) if isinstance(place, Mapping) else None


def to_transformers4(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the keys of transformers 4.52; one that has them already is copied unchanged.

    `rope_parameters` becomes `rope_theta`, `partial_rotary_factor` where given, and `rope_scaling` unless the type is
    "default"; GPT-NeoX has its own names for them. `dtype` becomes `torch_dtype`. Everything else stays as it is.

    Raises:
        ConfigTranslationError: rotary parameters per layer type, which transformers 4.52 cannot express.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    if "dtype" in result:
        result["torch_dtype"] = result.pop("dtype")
    rope = result.pop("rope_parameters", None)
    if rope is None:
        return result
    nested = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if nested:
        raise ConfigTranslationError(
            f"rope_parameters differ by layer type ({', '.join(nested)}), which toolchains on transformers 4 "
            "cannot read: use a backend on a newer transformers, such as method=rtn"
        )
    neox = result.get("model_type") == "gpt_neox"
    theta, fraction = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    if theta is not None:
        result["rotary_emb_base" if neox else "rope_theta"] = theta
    if fraction is not None:
        result["rotary_pct" if neox else "partial_rotary_factor"] = fraction
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    result.pop("rope_scaling", None)
    if kind != "default":
        result["rope_scaling"] = _rope_scaling(kind, rope, result)
    return result


def _rope_scaling(kind: str, rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != "phi3":
        return {"rope_type": kind, **rope}
    # The Phi3 check of 4.52 accepts exactly these three keys; the original length goes next to them.
    if "original_max_position_embeddings" in rope:
        config.setdefault("original_max_position_embeddings", rope["original_max_position_embeddings"])
    return {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor") if key in rope}}


def legacy_copy(model_dir: str | Path, into: Path) -> Path:
    """Fill the folder `into` with links to all files of a model and a translated config.json; returns `into`.

    Raises:
        ConfigTranslationError: see `to_transformers4`.
        OSError: there is no config.json, or `into` already has files of these names.
    """
    model_dir = Path(model_dir).resolve()
    config = to_transformers4(read_config(model_dir))
    into.mkdir(parents=True, exist_ok=True)
    for path in sorted(model_dir.iterdir()):
        if path.name != "config.json":
            (into / path.name).symlink_to(path)
    write_config(into / "config.json", config)
    return into


def restore_config(source_config: Mapping[str, Any], saved_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a result: the source's, with the quantization and dtype that the toolchain saved.

    Args:
        source_config: of the float model, in the keys of either version.
        saved_config: as saved by the toolchain; `quantization_config` and `torch_dtype` or `dtype` are taken from it.
    """
    result: dict[str, Any] = copy.deepcopy(dict(source_config))
    if "quantization_config" in saved_config:
        result["quantization_config"] = copy.deepcopy(saved_config["quantization_config"])
    dtype = saved_config.get("dtype", saved_config.get("torch_dtype"))
    if dtype is not None:
        key = "dtype" if "dtype" in result else "torch_dtype"
        result[key] = dtype
        if "dtype" in result and "torch_dtype" in result:
            result["torch_dtype"] = dtype
    return result


def misread_values(source_config: Mapping[str, Any], loaded_config: Mapping[str, Any]) -> list[str]:
    """Values that a library on transformers 4 read differently from config.json, rotary ones first; for error messages.

    Args:
        source_config: of the model, in the keys of either version.
        loaded_config: the library's config object as a dict.
    """
    expected = to_transformers4(source_config)
    faults = [
        f"{key} is {value!r} in config.json and was read as {loaded_config.get(key)!r}"
        for key, value in expected.items()
        if key not in _NOT_COMPARED and value is not None and loaded_config.get(key) != value
    ]
    return sorted(faults, key=lambda fault: (not fault.startswith(("rope", "rotary", "partial_rotary")), fault))


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        UserError: there is no config.json, it is not a JSON object, or a number in it is none.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}); download the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a JSON object; download the model again")
    if fault := number_fault(config):
        raise UserError(f"{path.parent}: {fault}")
    return config


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write JSON as model folders do: indented by 2, keys in their order, a newline at the end."""
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
