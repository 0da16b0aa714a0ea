"""A model folder of a few kilobytes: valid headers, a byte-level tokenizer trained on the spot, no network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from quantline.checkpoints.checkpoint import write_safetensors

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
VOCAB_SIZE = 300
SENTENCES = ["the quick brown fox jumps over the lazy dog", "a model of a model is a model", "numbers 0 1 2 3 4 5 6"]


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with an end-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<eos>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    if chat_template:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_config(folder: Path, **changes: object) -> None:
    """config.json of a Qwen2; `changes` replace or add keys."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def write_model(folder: Path, *, shards: int = 1, chat_template: str | None = None) -> Path:
    """A whole model folder with random weights in `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    write_tokenizer(folder, chat_template)
    (folder / "LICENSE").write_text("free to use\n")
    rng = np.random.default_rng(0)
    weights = {f"layer{index}.weight": rng.random((16, 16), dtype=np.float32) for index in range(2 * shards)}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return folder
    names, where = sorted(weights), {}
    for index in range(shards):
        shard = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[2 * index : 2 * index + 2]
        write_safetensors(folder / shard, {name: weights[name] for name in part})
        where.update(dict.fromkeys(part, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
