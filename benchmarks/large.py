"""The whole pipeline on a model of a large shape: `python -m benchmarks.large SHAPE [NAME=VALUE ...]`.

SHAPE is a name such as qwen3-8b, with `:N` for the first N layers alone. A model of that shape with random
weights and the demo's tokenizer is written to .bench/, and goes by hand through download, calibrate, quantize, convert,
serve_smoke and evaluate, its float baseline too. What the stages measured of themselves is printed: seconds, and the peaks
of the processes' memory on the host and on the GPU.

`--gpu-gib N` holds each process to N GiB of the GPU's memory, by torch's allocator; `--until STAGE` stops there. Everything
else is passed on to `stages.run`. A second run goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods import ROOT
from quantline.checkpoints.model_files import INDEX_NAME
from quantline.checkpoints.safetensors_file import numpy_dtype, write_safetensors
from quantline.pipeline.paths import SAVED
from quantline.pipeline.stages import PIPELINE


def _config(
    model: str, layers: int, widths: tuple[int, int], heads: tuple[int, int], vocabulary: int
) -> dict[str, Any]:
    """The sizes in config.json. widths: of the layers and of their MLP. heads: of queries, and of keys and values."""
    return {
        "model_type": model, "architectures": [f"{model.capitalize()}ForCausalLM"], "hidden_size": widths[0],
        "intermediate_size": widths[1], "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": 128, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "rope_theta": 10000, "rms_norm_eps": 1e-5,
    }  # fmt: skip


SHAPES = {
    "qwen3-8b": _config("qwen3", 36, (4096, 12288), (32, 8), 151936),
    "llama-2-7b": _config("llama", 32, (4096, 11008), (32, 32), 32000),
    "llama-3-70b": _config("llama", 80, (8192, 28672), (64, 8), 128256),
    "tiny": _config("llama", 4, (256, 512), (2, 1), 8192),
}
_RANDOM = 2**22
_FOUR_TIMES = np.uint16(2 << 7)  # 2 added to a bfloat16's exponent
_TOKENIZER = ROOT / "assets" / "demo" / "model" / "tokenizer.json"


def shape_of(text: str) -> dict[str, Any]:
    """The sizes that a command line names, such as qwen3-8b or qwen3-8b:10.

    Raises:
        SystemExit: there is no such shape.
    """
    family, _, layers = text.partition(":")
    if family not in SHAPES or not (layers or "1").isdecimal():
        raise SystemExit(f"{text}: give one of {', '.join(SHAPES)}, and behind a colon the number of layers")
    return {**SHAPES[family], **({"num_hidden_layers": int(layers)} if layers else {})}


def folder_of(text: str, ending: str = "") -> Path:
    """Where the model of a shape is."""
    return ROOT / ".bench" / f"{text.replace(':', '-')}{ending}"


def tensors_of(shape: dict[str, Any], layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a layer, or of what is outside the layers (None)."""
    hidden, wide, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    query, key = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    if layer is None:
        table = (shape["vocab_size"], hidden)
        return {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table}
    within = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    if shape["model_type"] == "qwen3":
        within |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    return {f"model.layers.{layer}.{name}.weight": size for name, size in within.items()}


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a model of a shape: bfloat16 weights of a spread of 0.02, a shard for every four layers.

    Rows of the output layer for words of the tokenizer are four times as large. So the model answers with visible
    text, as the smoke test asks, though most of its ids have no text and the first ones end an answer.
    """
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal(_RANDOM, dtype=np.float32) * np.float32(0.02)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    one = np.full(1, 0x3F80, np.uint16)  # 1.0 in bfloat16

    vocabulary = json.loads(_TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    words = [number for token, number in vocabulary.items() if re.search("[A-Za-z]{3}", token)]

    def tensor(name: str, size: tuple[int, ...], at: int) -> Any:
        filled = np.resize(np.roll(bits, at * 7919) if len(size) > 1 else one, size)
        if name == "lm_head.weight":
            filled[words] += _FOUR_TIMES
        return filled.view(numpy_dtype("BF16"))

    groups: list[list[int | None]] = [[None]]
    layers = list(range(shape["num_hidden_layers"]))
    groups += [list(layers[start : start + 4]) for start in range(0, len(layers), 4)]
    places: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        sizes = {key: size for layer in group for key, size in tensors_of(shape, layer).items()}
        write_safetensors(folder / name, {key: tensor(key, size, at) for at, (key, size) in enumerate(sizes.items())})
        places.update(dict.fromkeys(sizes, name))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {**shape, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}, indent=2))
    for path in _TOKENIZER.parent.glob("tokenizer*"):
        shutil.copy(path, folder)


def measured(root: Path, model: Path) -> list[str]:
    """A line for each stage of a model in scratch/: seconds, and peaks in GB of its processes on the host and on the GPU."""
    lines = [f"{'stage':<12} {'of':<48} {'seconds':>8} {'host GB':>8} {'GPU GB':>7}"]
    for stage in PIPELINE:
        for path in sorted(root.glob(f"scratch/**/{stage}.json")):
            saved = path.parent / SAVED
            if not saved.is_file() or json.loads(saved.read_text())["config"]["model"]["path"] != str(model):
                continue
            result = json.loads(path.read_text())
            peak = result["monitor"]["peak"]
            gpu = [value for key, value in peak.items() if "gpu" in key and "memory_used" in key]
            shown = f"{max(gpu) / 1e9:.2f}" if gpu else "-"
            of = path.parent.relative_to(root / "scratch").as_posix()
            seconds, host = result["timings"]["total_seconds"], peak["rss_bytes"] / 1e9
            lines.append(f"{stage:<12} {of[:48]:<48} {seconds:>8.0f} {host:>8.2f} {shown:>7}")
    return lines


def main() -> None:
    """See the module's description."""
    usage = "python -m benchmarks.large SHAPE [--gpu-gib N] [--until STAGE] [NAME=VALUE ...]"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}; :N behind it for its first N layers")
    parser.add_argument("--gpu-gib", type=float, default=None, help="of the GPU's memory for each process")
    parser.add_argument("--until", default="evaluate", choices=PIPELINE)
    given, overrides = parser.parse_known_args()
    shape, folder = shape_of(given.shape), folder_of(given.shape)
    started = time.perf_counter()
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, shape)
        print(f"made {folder.name} in {time.perf_counter() - started:.0f} s", flush=True)
    environment = dict(os.environ)
    if given.gpu_gib:
        import torch

        share = given.gpu_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            environment[name] = f"per_process_memory_fraction:{share:.4f}"
    command = [
        sys.executable, "-m", "stages.run", f"until={given.until}", "model=custom", f"model.path={folder}",
        "tracking.enabled=false", "tasks=none", "speed=none", *overrides,
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    print(f"stages.run: exit {done.returncode}, {time.perf_counter() - started:.0f} s")
    print("\n".join(measured(ROOT, folder)))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
