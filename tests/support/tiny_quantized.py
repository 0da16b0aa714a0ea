"""Quantized checkpoints of a few hundred kilobytes in any layout, valid or deliberately not what a server takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import VOCAB_SIZE, write_tokenizer

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.layouts import LAYOUTS, dequantize, quantize_rtn
from quantline.checkpoints.layouts.msmodelslim import codec
from quantline.checkpoints.linears import modules_left
from quantline.checkpoints.quantization_config import LayerSettings, describe

VOCAB = VOCAB_SIZE + 20  # a multiple of 32, so that an output layer can be packed
LAYER = "model.layers.0."
REFERENCE = "dequantized.npz"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def mlp_of(experts: int = 0) -> tuple[str, ...]:
    """Names of the MLP's linears, of each expert's if there are experts."""
    if not experts:
        return MLP
    return tuple(name.replace("mlp.", f"mlp.experts.{number}.") for number in range(experts) for name in MLP)


def float_weights(
    hidden: int = 256, inner: int = 512, *, tied: bool = True, layers: int = 1, experts: int = 0
) -> dict[str, Any]:
    """A Qwen2 of one layer with random weights, float16: 4 heads, 2 of them for keys and values.

    experts: of a Qwen2-MoE without a shared expert, in place of the MLP.
    """
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (random.normal(size=shape) * 0.05).astype(np.float16)

    weights = {"model.embed_tokens.weight": normal(VOCAB, hidden), "model.norm.weight": np.ones(hidden, np.float16)}
    if not tied:
        weights["lm_head.weight"] = normal(VOCAB, hidden)
    for index in range(layers):
        layer = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"] = np.ones(hidden, np.float16)
        for name, out in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2)):
            weights[f"{layer}self_attn.{name}_proj.weight"] = normal(out, hidden)
            weights[f"{layer}self_attn.{name}_proj.bias"] = normal(out)
        weights[f"{layer}self_attn.o_proj.weight"] = normal(hidden, hidden)
        for name in mlp_of(experts):
            shape = (hidden, inner) if name.endswith("down_proj") else (inner, hidden)
            weights[f"{layer}{name}.weight"] = normal(*shape)
        if experts:
            weights[f"{layer}mlp.gate.weight"] = normal(experts, hidden)
    return weights


def float_config(
    hidden: int = 256, inner: int = 512, *, tied: bool = True, layers: int = 1, experts: int = 0
) -> dict[str, Any]:
    """Its config.json."""
    mixture = {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": experts,
        "num_experts_per_tok": 2, "moe_intermediate_size": inner, "shared_expert_intermediate_size": 0,
    }  # fmt: skip
    dense = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": tied, "torch_dtype": "float16",
    }  # fmt: skip
    return {**dense, **(mixture if experts else {})}


def write_float(
    folder: Path, hidden: int = 256, inner: int = 512, *, tied: bool = True, layers: int = 1, experts: int = 0
) -> Path:
    """The float model itself."""
    options: dict[str, Any] = {"tied": tied, "layers": layers, "experts": experts}
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", float_weights(hidden, inner, **options))
    (folder / "config.json").write_text(json.dumps(float_config(hidden, inner, **options)))
    write_tokenizer(folder)
    return folder


def shapes_of(
    hidden: int = 256, inner: int = 512, *, head: bool = False, experts: int = 0
) -> dict[str, tuple[int, int]]:
    """(in, out) of its linears, by name."""
    outs = {"q": hidden, "k": hidden // 2, "v": hidden // 2, "o": hidden}
    found = {f"{LAYER}self_attn.{name}_proj": (hidden, out) for name, out in outs.items()}
    for name in mlp_of(experts):
        found[LAYER + name] = (inner, hidden) if name.endswith("down_proj") else (hidden, inner)
    return found | ({"lm_head": (hidden, VOCAB)} if head else {})


def write_quantized(
    folder: Path,
    layout: str,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    says: Mapping[str, Any] | None = None,
    own: Mapping[str, LayerSettings] | None = None,
    skip: Iterable[str] = (),
    hidden: int = 256,
    inner: int = 512,
    head: bool = False,
    names_head: bool = False,
    experts: int = 0,
) -> dict[str, Any]:
    """Write a quantized checkpoint and, in `dequantized.npz`, what its quantized weights stand for.

    layout: of `LAYOUTS`, or w8a8, msmodelslim, or bitsandbytes (a config only). own: settings of linears that differ,
    skip: linears left in float, both without the layer's prefix. says: replaces keys of the quantization_config.
    experts: of a mixture. head: the output layer is its own and quantized; names_head: the config says so.

    Returns:
        The quantization_config; msModelSlim has none, and what this returns instead is not written.
    """
    folder.mkdir(parents=True)
    main, own, skip = LayerSettings(bits, group_size, sym), own or {}, list(skip)
    weights, meanings = float_weights(hidden, inner, tied=not head, experts=experts), {}
    for name in [f"{LAYER}{name}" for name in (*ATTENTION, *mlp_of(experts))] + (["lm_head"] if head else []):
        short = name.removeprefix(LAYER)
        if layout == "bitsandbytes" or short in skip:
            continue
        width, weight = own.get(short, main), weights.pop(f"{name}.weight")
        if layout == "w8a8":
            scale = np.abs(weight.astype(np.float32)).max(axis=1, keepdims=True) / 127
            codes = np.rint(weight / scale).astype(np.int8)
            tensors, meaning = {"weight": codes, "weight_scale": scale.astype(np.float32)}, codes * scale
        else:
            linear = quantize_rtn(weight, width.bits, width.group_size, width.symmetric)
            write = codec.write if layout == "msmodelslim" else LAYOUTS[layout].write
            tensors, meaning = write(linear), dequantize(linear)
        weights.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        meanings[name] = meaning
    ignored = modules_left(([] if head else ["lm_head"]) + [LAYER + name for name in skip], meanings)
    overrides = {LAYER + name: settings for name, settings in own.items()}
    if layout == "bitsandbytes":
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    elif layout == "w8a8":
        config = w8a8_config(ignored)
    elif layout == "msmodelslim":
        config = {"quant_method": "msmodelslim"}
    else:
        config = describe(
            layout, bits=bits, group_size=group_size, symmetric=sym, modules_to_not_convert=ignored,
            overrides=overrides, quantized_head=names_head,
        )  # fmt: skip
    config |= says or {}
    write_safetensors(folder / "model.safetensors", weights)
    np.savez(folder / REFERENCE, **meanings)
    whole = float_config(hidden, inner, tied=not head, experts=experts)
    if layout != "msmodelslim":
        whole["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(whole))
    write_tokenizer(folder)
    return config


def write_whole(folder: Path, layout: str, *, layers: int = 2, tied: bool = False, bits: int = 4) -> Path:
    """A whole Qwen2 of some layers, all linears but the output layer quantized in groups of 64."""
    folder.mkdir(parents=True)
    weights = float_weights(128, 256, tied=tied, layers=layers)
    for name in [name for name in weights if "proj.weight" in name]:
        linear = quantize_rtn(weights.pop(name), bits, 64, symmetric=True)
        stored = LAYOUTS[layout].write(linear)
        weights.update({name.replace("weight", suffix): tensor for suffix, tensor in stored.items()})
    section = describe(layout, bits=bits, group_size=64, symmetric=True, modules_to_not_convert=["lm_head"])
    config = float_config(128, 256, tied=tied, layers=layers)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    write_safetensors(folder / "model.safetensors", weights)
    write_tokenizer(folder)
    return folder


def w8a8_config(ignored: list[str]) -> dict[str, Any]:
    """compressed-tensors: int8 weights by output channel, int8 activations by token."""
    fixed = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**fixed, "strategy": "channel", "dynamic": False},
        "input_activations": {**fixed, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignored, "kv_cache_scheme": None,
    }  # fmt: skip
