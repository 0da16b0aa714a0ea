"""What the llm-compressor worker wrote, served by the real vLLM: the same scores as the reference engine's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sections
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from quantline.checkpoints.checkpoint import quantization_of
from quantline.serving.logprobs import score
from quantline.serving.server import serve
from quantline.toolchains import environments, runner

OPTIONS = sections.server(dtype="bfloat16", max_model_len=257, kv_cache_gib=0.25, threads=1)
WINDOWS, LENGTH = 8, 256

pytestmark = [
    pytest.mark.usefixtures("serves_4_bits"),
    pytest.mark.toolchain("llmcompressor"),
    pytest.mark.toolchain("vllm"),
]


def widths():
    """4 bits throughout, in three group sizes, some linears left float: all that rules by layer can ask for."""
    blocks = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    names = [f"model.layers.{i}.{block}.{part}_proj" for i in range(5) for block in blocks for part in blocks[block]]
    found = {name: {"bits": 4, "group_size": 32 if "down" in name else 128} for name in names}
    for name in names:
        if "layers.1.self_attn" in name:
            found[name]["group_size"] = 64
        elif name in ("model.layers.2.self_attn.o_proj", "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"):
            del found[name]
    return found


def tokens(root, name, rows, length):
    tokenizer = Tokenizer.from_file(str(root / "assets" / "demo" / "model" / "tokenizer.json"))
    ids = []
    with (root / "assets" / "demo" / f"{name}.jsonl").open() as file:
        while len(ids) < rows * length:
            ids += [*tokenizer.encode(json.loads(next(file))["text"]).ids, 0]
    return np.array(ids[: rows * length], dtype=np.int32).reshape(rows, length)


@pytest.fixture(scope="module")
def demo(root, work, tmp_path_factory):
    """The demo model's calibration, probe and windows to score."""
    folder = tmp_path_factory.mktemp("demo")
    save_file({"input_ids": tokens(root, "calibration", 8, 128)}, folder / "tokens.safetensors")
    windows = tokens(root, "evaluation", WINDOWS, LENGTH)
    offsets = np.arange(WINDOWS + 1, dtype=np.int64) * LENGTH
    save_file({"input_ids": windows.reshape(-1), "offsets": offsets}, folder / "windows.safetensors")
    probe = {
        "checkpoint": str(root / "assets" / "demo" / "model"), "input_ids": windows[:2, :64].tolist(),
    }  # fmt: skip
    work("reference", "quantline.toolchains.workers.reference.engine", probe, output=folder / "probe.safetensors")
    return root, folder, windows


@pytest.fixture(scope="module")
def work(root, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")

    def start(toolchain, module, job, *, output):
        return runner.run_worker(
            environments.ensure(root, toolchain), module, {**job, "output": str(output)}, log=logs / "log", threads=1,
            label=module,
        ).data  # fmt: skip

    return start


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("W8A8", {"method": "rtn", "bits": 8, "group_size": -1, "options": {"activation_bits": 8}}),
        ("W4A16", {"method": "gptq", "bits": 4, "group_size": 128, "options": {"sym": False}, "linears": widths()}),
    ],
)
def test_vllm_scores_as_the_reference_engine_does(tmp_path, demo, work, label, values):
    root, folder, windows = demo
    out = tmp_path / "quantized"
    out.mkdir()
    job = {
        "model": str(root / "assets" / "demo" / "model"), "calibration": str(folder / "tokens.safetensors"),
        "probe": str(folder / "probe.safetensors"), "probe_tolerance": 0.05, "seed": 0, "threads": 1, "device": "cpu",
        **values,
    }  # fmt: skip
    work("llmcompressor", "quantline.toolchains.workers.quantizers.llmcompressor", job, output=out)
    assert quantization_of(out).activation_bits == (8 if label == "W8A8" else None)
    scores = tmp_path / "scores.safetensors"
    scoring = {"checkpoint": str(out), "windows": str(folder / "windows.safetensors")}
    work("reference", "quantline.toolchains.workers.reference.evaluate", scoring, output=scores)
    expected = load_file(scores)["logprobs"].reshape(WINDOWS, LENGTH)[:, 1:]
    python = environments.environment_folder(root, "vllm") / "bin" / "python"
    with serve(python, out, OPTIONS, log=tmp_path / "server.log") as server:
        found = np.stack(score(server, list(windows)))
    difference = np.expm1(expected.mean() - found.mean())
    print(
        f"{label}: perplexity {np.exp(-found.mean()):.4f} served, {np.exp(-expected.mean()):.4f} by the reference engine"
    )
    assert abs(difference) < 0.01
    assert np.median(np.abs(found - expected)) < 0.05
