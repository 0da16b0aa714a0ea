"""What `llama-quantize` itself makes of small files, kept beside the tests that compare with it.

    python tests/support/llama_quantize.py LLAMA_QUANTIZE

writes tests/checkpoints/layouts/gguf/llama_quantize.json: of each model and mixture the types of its tensors, in the order
of the file, and for some the SHA-256 of the whole file. LLAMA_QUANTIZE is the program, built from llama.cpp 0c1e57098 as it
is in the sdist of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE / "support"), str(HERE.parent / "src")]

from gguf_files import gguf_bytes  # noqa: E402

from quantline.checkpoints.layouts.gguf.header import read_gguf  # noqa: E402
from quantline.checkpoints.layouts.gguf.mixtures import MIXTURES, NEEDS_IMATRIX  # noqa: E402

KEPT = HERE / "checkpoints/layouts/gguf/llama_quantize.json"
# name -> architecture, layers, heads, heads of keys, columns, experts, whether the output layer is tied
MODELS: dict[str, tuple[str, int, int, int, int, int, bool]] = {
    "own-keys": ("llama", 24, 4, 4, 256, 0, False),
    "shared-keys": ("llama", 10, 8, 2, 256, 0, True),
    "cut-rows": ("qwen2", 5, 6, 2, 384, 0, True),
    "odd-rows": ("llama", 3, 4, 4, 48, 0, False),
    "as-70b": ("llama", 80, 8, 2, 256, 0, False),
    "experts": ("llama", 9, 8, 2, 256, 8, False),
}
WHOLE = ("cut-rows", "shared-keys")


def model(name: str) -> bytes:
    """A float file of a few rows a tensor; the quantizer does not look at the number of rows."""
    architecture, layers, heads, keys, columns, experts, tied = MODELS[name]
    random = np.random.default_rng(len(name))
    settings: dict[str, Any] = {"general.architecture": architecture, "general.name": name, "general.file_type": 0}
    numbers = {
        "block_count": layers, "context_length": 64, "embedding_length": columns, "feed_forward_length": columns,
        "attention.head_count": heads, "attention.head_count_kv": keys,
    }  # fmt: skip
    numbers |= {"expert_count": experts, "expert_used_count": 2} if experts else {}
    settings |= {f"{architecture}.{key}": value for key, value in numbers.items()}
    settings |= {f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5, f"{architecture}.rope.freq_base": 10000.0}
    settings |= {f"{architecture}.vocab_size": 4, "tokenizer.ggml.model": "no_vocab"}

    def weight(*rows: int) -> np.ndarray:
        return random.standard_t(4, (*rows, columns)).astype(np.float32)

    tensors = {"token_embd.weight": weight(4), "output_norm.weight": np.ones(columns, np.float32)}
    tensors |= {} if tied else {"output.weight": weight(4)}
    for layer in range(layers):
        parts: dict[str, np.ndarray] = {
            "attn_norm": np.ones(columns, np.float32),
            "ffn_norm": np.ones(columns, np.float32),
        }
        parts |= {f"attn_{part}": weight(2) for part in ("q", "k", "v", "output")}
        stack = (experts, 2) if experts else (2,)
        parts |= {f"ffn_{part}{'_exps' if experts else ''}": weight(*stack) for part in ("gate", "up", "down")}
        parts |= {"ffn_gate_inp": weight(experts)} if experts else {}
        tensors |= {f"blk.{layer}.{part}.weight": array for part, array in parts.items()}
    return gguf_bytes(settings, tensors)


def importance(data: Path) -> dict[str, np.ndarray]:
    """How much each column counts; of every tensor inside the layers, float32 (experts * columns,)."""
    random = np.random.default_rng(7)
    found = {}
    for name, one in read_gguf(data).tensors.items():
        if name.startswith("blk.") and len(one.shape) > 1:
            copies = one.shape[0] if len(one.shape) == 3 else 1
            found[name] = random.gamma(1.0, 1.0, copies * one.shape[-1]).astype(np.float32)
    return found


def importance_bytes(found: dict[str, np.ndarray]) -> bytes:
    """The same as a file of llama-imatrix: sums of squares, and the number of tokens."""
    tensors: dict[str, np.ndarray] = {}
    for name, values in found.items():
        tensors[f"{name}.in_sum2"] = values[None] * np.float32(1)
        tensors[f"{name}.counts"] = np.ones((1, 1), np.float32)
    settings = {
        "general.type": "imatrix",
        "imatrix.chunk_count": 1,
        "imatrix.chunk_size": 512,
        "imatrix.datasets": ["x"],
    }
    return gguf_bytes(settings, tensors)


def runs(kinds: list[str]) -> str:
    """`Q4_K*3 Q6_K*1`."""
    return " ".join(f"{kind}*{len(list(same))}" for kind, same in itertools.groupby(kinds))


def main(program: str) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source, out, scale = (Path(scratch, name) for name in ("f.gguf", "q.gguf", "i.gguf"))
        for name in MODELS:
            source.write_bytes(model(name))
            scale.write_bytes(importance_bytes(importance(source)))
            for mixture, weighed in itertools.product(MIXTURES, (False, True)):
                if mixture in NEEDS_IMATRIX and not weighed:
                    continue
                if name in ("experts", "as-70b") and weighed:
                    continue
                given = ["--imatrix", str(scale)] if weighed else []
                done = subprocess.run(
                    [program, *given, str(source), str(out), mixture, "1"], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    sys.exit(f"{name} {mixture}: {done.stderr[-600:]}")
                tensors = read_gguf(out).tensors
                quantized = [one.kind if isinstance(one.kind, str) else one.kind.name for one in tensors.values()]
                entry: dict[str, Any] = {"types": runs(quantized)}
                if name in WHOLE and not weighed:
                    entry["sha256"] = hashlib.sha256(out.read_bytes()).hexdigest()
                if name in WHOLE and weighed:
                    # The file also names the importance matrix, so that only the tensors are compared.
                    start = min(one.offset for one in tensors.values())
                    entry["tensors_sha256"] = hashlib.sha256(out.read_bytes()[start:]).hexdigest()
                found[f"{name} {mixture}{' imatrix' if weighed else ''}"] = entry
    KEPT.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
