"""Writes small GGUF files, byte for byte by the format's description, without the library that reads or writes them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES

FLOATS = {"float32": 0, "float16": 1}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def setting(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def gguf_bytes(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray | tuple[str, np.ndarray]], *, version: int = 3
) -> bytes:
    """A file. tensors: name -> float array, or a block type and the rows of blocks, uint8 (..., bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings))
    head += b"".join(text(key) + setting(value) for key, value in settings.items())
    data = b""
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind, array = BLOCK_TYPES[value[0]], value[1]
            shape, number = (*array.shape[:-1], array.shape[-1] // kind.nbytes * kind.weights), kind.number
        else:
            array, shape, number = value, value.shape, FLOATS[value.dtype.name]
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", number, len(data))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    return head + bytes(-len(head) % 32) + data


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[str, np.ndarray]:
    """Rows of random codes, with scales of about 0.01."""
    one = BLOCK_TYPES[kind]
    random = np.random.default_rng(seed)
    found = random.integers(0, 256, (rows, columns // one.weights * one.nbytes), dtype=np.uint8)
    blocks = found.reshape(-1).view(one.record)
    for name in ("d", "dmin", "m"):
        if name in (one.record.names or ()):
            blocks[name] = random.normal(0, 0.01, len(blocks)).astype(np.float16)
    return kind, found


def small_model(folder: Path, *, kind: str = "Q8_0", architecture: str = "llama", columns: int = 256) -> Path:
    """A folder with a model of one layer: linears of `kind`, embeddings of Q8_0, 4 heads and 2 of keys."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "general.architecture": architecture, f"{architecture}.block_count": 1,
        f"{architecture}.attention.head_count": 4, f"{architecture}.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": ["a", "bc"],
    }  # fmt: skip
    rows = {"attn_q": columns, "attn_k": columns // 2, "attn_v": columns // 2, "attn_output": columns}
    rows |= {"ffn_gate": columns, "ffn_up": columns, "ffn_down": columns}
    tensors: dict[str, Any] = {"token_embd.weight": random_rows("Q8_0", 32, columns)}
    tensors |= {
        f"blk.0.{name}.weight": random_rows(kind, high, columns, seed) for seed, (name, high) in enumerate(rows.items())
    }
    tensors |= {f"blk.0.{name}.weight": np.full(columns, 2.0, np.float32) for name in ("attn_norm", "ffn_norm")}
    tensors["output_norm.weight"] = np.full(columns, 2.0, np.float32)
    (folder / "model.gguf").write_bytes(gguf_bytes(settings, tensors))
    section = {"quant_method": "gguf", "type": "Q4_K_M", "imatrix": False, "file": "model.gguf"}
    config = {
        "model_type": architecture, "architectures": ["LlamaForCausalLM"], "hidden_size": columns,
        "intermediate_size": columns, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 32, "tie_word_embeddings": True, "quantization_config": section,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
