"""Speed of float, AWQ and GPTQ at 4 bits on a GPU with `stages.speed`, for the demo model and larger shapes.

    python -m benchmarks.gpu_speed MODEL [STEP ...] [OVERRIDE ...]

MODEL is demo, 1b or 7b. The steps are `prepare`, which makes the checkpoints, and the names of the variants to measure; all
by default. Existing checkpoints are reused.

The larger models are Llamas with random weights, made here: nothing is downloaded, and the speed does not depend on the
values of the weights. Their quantized checkpoints are real, rounded to nearest and written in the AWQ and GPTQ layouts by
the pipeline, so that vLLM loads codes. A dummy load of `quant_method: gptq` loads floats, as its memory shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "assets" / "demo" / "model"
# hidden, layers, inner, heads, key-value heads; those of TinyLlama-1.1B and Llama-2-7B.
SHAPES = {"1b": (2048, 22, 5632, 32, 4), "7b": (4096, 32, 11008, 32, 32)}
VOCABULARY = 32000
VARIANTS = {"awq-w4-g128": ["method=rtn", "method.sym=false"], "gptq-w4-g128": ["method=rtn", "method.sym=true"]}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def make_model(shape: str) -> Path:
    """A Llama checkpoint of the shape with normal weights (deviation 0.02), bfloat16, one file per layer, a tokenizer."""
    import torch
    from safetensors.torch import save_file

    hidden, layers, inner, heads, key_heads = SHAPES[shape]
    folder = ROOT / "scratch" / "models" / f"llama-{shape}"
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def normal(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, device=device) * 0.02).to(torch.bfloat16).cpu()

    def ones() -> Any:
        return torch.ones(hidden, dtype=torch.bfloat16)

    narrow = hidden * key_heads // heads
    places: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, Any]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * 2 for tensor in tensors.values())

    files = layers + 1
    for layer in range(layers):
        at = f"model.layers.{layer}"
        write(f"model-{layer + 1:05}-of-{files:05}.safetensors", {
            f"{at}.self_attn.q_proj.weight": normal(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": normal(narrow, hidden),
            f"{at}.self_attn.v_proj.weight": normal(narrow, hidden),
            f"{at}.self_attn.o_proj.weight": normal(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": normal(inner, hidden), f"{at}.mlp.up_proj.weight": normal(inner, hidden),
            f"{at}.mlp.down_proj.weight": normal(hidden, inner),
            f"{at}.input_layernorm.weight": ones(), f"{at}.post_attention_layernorm.weight": ones(),
        })  # fmt: skip
    write(f"model-{files:05}-of-{files:05}.safetensors", {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden), "model.norm.weight": ones(),
        "lm_head.weight": normal(VOCABULARY, hidden),
    })  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        if (DEMO / name).is_file():
            shutil.copyfile(DEMO / name, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run_stage(stage: str, overrides: list[str], result: Path | None = None) -> None:
    """Run one stage manually and print its time; skipped if its result exists."""
    if result is not None and result.is_file():
        return
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"stages.{stage}", *overrides], cwd=ROOT, check=True)
    print(f"[{stage}: {time.perf_counter() - began:.0f} s]", flush=True)


def main(model: str, words: list[str]) -> None:
    """Run the steps, and print all tables again at the end."""
    sys.path.insert(0, str(ROOT / "src"))
    from quantline.evaluation.speed.table import render_speed_table

    overrides = [word for word in words if "=" in word]
    wanted = [word for word in words if "=" not in word] or list(VARIANTS)
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "scratch"
    scratch, python = ROOT / "scratch", sys.executable
    path = DEMO if model == "demo" else make_model(model)
    common = [
        f"model.path={path}", "device=cuda", "tracking.enabled=false", "speed=sweep", "layer_errors.enabled=false",
        "calibration.n_samples=1", "serve.process.kv_cache_gib=1", "serve.process.gpu_memory_utilization=0.4",
        f"toolchains.vllm={python}", f"toolchains.reference={python}", *overrides,
    ]  # fmt: skip
    tables = []
    for name, own in VARIANTS.items():
        if name not in wanted and "prepare" not in wanted:
            continue
        variant = f"{model}-{name}"
        options = [*own, *common, f"variant={variant}"]
        for stage in ("download", "calibrate"):  # both variants share these outputs
            run_stage(stage, options, scratch / f"{model}-{stage}.done")
            (scratch / f"{model}-{stage}.done").touch()
        for stage in ("quantize", "convert"):
            run_stage(stage, options, scratch / variant / f"{stage}.json")
        if name in wanted:
            run_stage("speed", options)
            tables.append(_kept(scratch / variant, variant, out, render_speed_table))
    text = "\n\n".join(tables) + "\n"
    (out / f"{model}-{'-'.join(wanted)}.md").write_text(text, encoding="utf-8")
    print(text)


def _kept(folder: Path, variant: str, out: Path, render: Callable[[dict[str, Any], str], str]) -> str:
    """Copy the measurements to `out`, and return the table."""
    document = json.loads((folder / "speed" / "speed.json").read_text(encoding="utf-8"))
    shutil.copyfile(folder / "speed" / "speed.json", out / f"{variant}-measured.json")
    for suffix in (".json", ".log", ".float.log", ".variant.log"):
        if (folder / f"speed{suffix}").is_file():
            shutil.copyfile(folder / f"speed{suffix}", out / f"{variant}-speed{suffix}")
    kernels = ", ".join(document["servers"][-1]["kernels"]) if document["servers"] else "not served"
    return f"{variant} ({kernels})\n\n{render(document, 'github')}"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo", sys.argv[2:])
