"""Tiny models, calibration ids and the reference engine's logits; runs in the reference toolchain: make_models.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

VOCAB = 256


def weights(model):
    """Weights with outlier channels, as trained models have them, and attention that depends on positions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                continue
            if "layers" in name:
                parameter.mul_(3.0)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(3.0)
            if "layers" in name:
                parameter[:, ::17] *= 4.0
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") and "layers" in name:
                parameter[::13] *= 6.0


def one_sided(model):
    """Groups of one sign: zero points at the end of the range, and beyond it where zero is not in the range."""
    with torch.no_grad():
        up = model.model.layers[0].mlp.up_proj.weight
        up[9], up[20] = up[9].abs(), up[20].abs()
        down = model.model.layers[1].mlp.down_proj.weight
        down[3, 64:128] = down[3, 64:128].abs() * 0.1 + 0.2
        down[4, 64:128] = -down[4, 64:128].abs() * 0.1 - 0.2


def overflow(model):
    with torch.no_grad():
        model.model.norm.weight[7] = 1e5


def make(folder, name, change=None, **settings):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.05,
    }  # fmt: skip
    sizes.update(settings)
    config = transformers.AutoConfig.for_model(sizes.pop("model_type", "qwen2"), **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    weights(model)
    if change:
        change(model)
    place = folder / name
    model.save_pretrained(place / "model")
    # Loaded again: converting a model in memory rounds its rotary frequencies, too.
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / "model" / file).write_text(f"{{ {file} }}\n\n", encoding="utf-8")
    generator = np.random.default_rng(0)
    save_file({"input_ids": generator.integers(0, VOCAB, (16, 64), dtype=np.int32)}, place / "tokens.safetensors")
    ids = generator.integers(0, VOCAB, (4, 48), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    save_file({"input_ids": ids, "logits": logits}, place / "probe.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    rope = {"rope_type": "default", "rope_theta": 1e6}
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    make(target, "qwen2", rope_parameters=rope)
    make(target, "one_sided", one_sided, rope_parameters=rope)
    make(target, "overflow", overflow, rope_parameters=rope)
    make(target, "llama", model_type="llama", rope_parameters=scaled, num_key_value_heads=2, tie_word_embeddings=False)
    make(target, "mixtral", model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
