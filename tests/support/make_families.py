"""Run by the interpreter of the reference environment: a tiny random model of each family, and its logits on a probe.

    python make_families.py FOLDER FAMILY ...

FOLDER/<family> gets `model/`, `tokens.safetensors` and `probe.safetensors`, the logits by the reference engine, as the
download stage records them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from quantline.toolchains.protocol import Reporter
from quantline.toolchains.workers.reference import engine

VOCAB = 320  # of the tokenizer in tiny_model.py, up to a multiple of 64
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 32, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "initializer_range": 0.2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "sliding_window": 128,
}  # fmt: skip
# Heads of 64, the fewest that vLLM's kernel on CPUs takes.
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "apertus": {"hidden_act": "xielu"},
    # A server rotates all layers where none slides, transformers none where a window is set.
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "codegen": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512, "rotary_dim": 16},
    "gemma4_text": {
        "global_head_dim": 32, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"], "num_experts": None,
    },
    # As published; transformers knows a size of heads without the key, vLLM does not.
    "glm4_moe": {"head_dim": 32, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_bigcode": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512,
    },
    "gptj": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 16},
    "bamba": {
        "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "attn_layer_indices": [1],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_dim": 128, "block_dim": 128,
    },
    # Heads in such numbers that the rows of in_proj are a multiple of 32.
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 32, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16},
    "nemotron_h": {
        "hybrid_override_pattern": "M*E-", "num_hidden_layers": 4, "mamba_num_heads": 32, "mamba_head_dim": 8, "n_groups": 1,
        "ssm_state_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 64,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    },
    "zamba2": {
        "mamba_d_state": 16, "n_mamba_heads": 32, "mamba_headdim": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_head_dim": 64,
        "attention_hidden_size": 256, "adapter_rank": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    },
    "mpt": {"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "mamba": {"state_size": 32, "time_step_rank": 64},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": {**HYBRID, "num_experts": 4},
    "qwen3_next": {**HYBRID, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
}  # fmt: skip


# Of the parts for images: SigLIP, CLIP, Pixtral, InternViT, Llama 4, and the Qwen-VL models in their own words.
VISION = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 4,
    "num_heads": 4, "image_size": 56, "patch_size": 14, "out_hidden_size": 128, "embed_dim": 96, "projector_dim": 128,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
# For models that take images, too: what their text_config and vision_config have of their own.
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({}, {}),
    "gemma4": (
        {**OWN["gemma4_text"], "pad_token_id": 0},
        {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "idefics3": ({}, {}),
    "internvl": ({}, {"image_size": [56, 56], "patch_size": [14, 14]}),
    "lfm2_vl": (OWN["lfm2"], {}),
    "llama4": (
        {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 256},
        {"vision_output_dim": 128, "projector_output_dim": 128, "projector_input_dim": 384},
    ),
    "llava": ({}, {}),
    "llava_onevision": ({}, {}),
    "mistral3": ({}, {}),
    "qwen2_5_vl": ({"rope_parameters": SECTIONS}, {"fullatt_block_indexes": [1]}),
    "qwen2_vl": ({"rope_parameters": SECTIONS}, {"hidden_size": 128}),
    "qwen3_5": (HYBRID, {}),
    "qwen3_vl": ({"rope_parameters": {**SECTIONS, "mrope_interleaved": True}}, {"deepstack_visual_indexes": [0]}),
    "smolvlm": ({}, {}),
}
# Token ids below the size of the vocabulary, which no probe has.
TOKENS = {
    key: 300 + number for number, key in enumerate(
        f"{name}_token_{word}" for word in ("id", "index")
        for name in ("image", "video", "boi", "eoi", "audio", "boa", "eoa", "vision_start", "vision_end")
    )
}  # fmt: skip


def whole_of(family: str) -> Any:
    """The config of a model that takes images, too, with tiny sizes."""
    kind = transformers.CONFIG_MAPPING[family]
    usual = kind() if family != "gemma4" else kind(vision_config={})
    parts = {}
    for name, own in zip(("text_config", "vision_config"), PARTS[family], strict=True):
        part = getattr(usual, name).to_dict()
        given = {key: value for key, value in (SIZES if name == "text_config" else VISION).items() if key in part}
        if "layer_types" in part and "layer_types" not in own:
            given["layer_types"] = ["full_attention"] * 2
        parts[name] = {**given, **own, "model_type": part["model_type"]}
    return kind(**parts, **{key: value for key, value in TOKENS.items() if key in usual.to_dict()})


def config_of(family: str) -> Any:
    """The family's config with tiny sizes: those that it knows by their usual names, and its own."""
    if family in PARTS:
        return whole_of(family)
    kind = transformers.CONFIG_MAPPING[family]
    usual = kind().to_dict()
    given = {key: value for key, value in SIZES.items() if key in usual}
    if "layer_types" in usual and "layer_types" not in OWN.get(family, {}):
        given["layer_types"] = ["full_attention"] * 2
    return kind(**{**given, **OWN.get(family, {})})


def make(folder: Path, family: str) -> None:
    torch.manual_seed(0)
    config = config_of(family)
    kind = transformers.AutoModelForMultimodalLM if family in PARTS else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1 and "layers" in name:
                parameter[..., ::17] *= 4.0  # outlier channels, as trained models have them
    model.to(torch.bfloat16).save_pretrained(folder / family / "model")
    random = np.random.default_rng(0)
    save_file({"input_ids": random.integers(0, 256, (8, 64), dtype=np.int32)}, folder / family / "tokens.safetensors")
    engine.run(
        {
            "checkpoint": str(folder / family / "model"),
            "input_ids": random.integers(0, 256, (2, 48)).tolist(), "output": str(folder / family / "probe.safetensors"),
        },
        Reporter(),
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = []
    for one in sys.argv[2:]:
        try:
            make(Path(sys.argv[1]), one)
        except Exception as error:  # all families are tried, and all that fail are named
            failed.append(f"{one}: {type(error).__name__}: {error}")
    if failed:
        sys.exit("\n".join(failed))
