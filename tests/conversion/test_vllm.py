"""What msModelSlim wrote, converted and served by the real vLLM: the same greedy tokens as the dequantized source means.

The reference is computed in float32 from the source's codes and float32 scales, the server in float16 from the cast ones.
Where they part, the reference's two likeliest tokens must be closer than float16 arithmetic tells apart: the fixture's
weights are random, so that its logits lie close together.
"""

from __future__ import annotations

import numpy as np
import pytest
import sections

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.layouts import dequantize
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.conversion.source import open_source
from quantline.core.files import read_json, write_json
from quantline.serving.command import SERVED_NAME
from quantline.serving.server import serve
from quantline.toolchains import environments, runner
from tests.conversion.test_convert_msmodelslim import FIXTURES, needs_fixtures

# The logits' standard deviation is 0.33; where tokens parted, margins of at most 0.0008 were seen.
NEAR_TIE = 0.005
MAX_TOKENS = 24
OPTIONS = sections.server(dtype="float16", max_model_len=128, kv_cache_gib=0.25, threads=1)

pytestmark = [pytest.mark.usefixtures("serves_4_bits"), pytest.mark.toolchain("vllm"), needs_fixtures]


def write_float(source_folder, out):
    """The source dequantized by this test's own account of it: (q - offset) * scale in float32, all else as it is."""
    source = open_source(source_folder)
    tensors = {name: np.array(source.tensors.read(old)) for name, old in source.carried.items()}
    for name, layer in source.layers.items():
        tensors[f"{name}.weight"] = dequantize(source.read(layer, False)[0])
    out.mkdir()
    write_safetensors(out / "model.safetensors", tensors)
    write_json(out / "config.json", read_json(source_folder / "config.json"))


@pytest.mark.parametrize(
    ("fixture", "target"),
    [
        ("w4a16_g64_awq_sym", "awq"), ("w4a16_perchannel_gptq_sym", "gptq"),
        ("w4a16_g64_awq_asym", "compressed_tensors"),  # its scales stay float32, which the server casts
    ],
)  # fmt: skip
def test_vllm_gives_the_greedy_tokens_of_the_dequantized_source(root, tmp_path, fixture, target):
    pythons = {name: environments.environment_folder(root, name) / "bin" / "python" for name in ("vllm", "reference")}
    if not all(path.exists() for path in pythons.values()):
        pytest.skip("the vllm and reference environments are not built")
    converted, plain = tmp_path / "converted", tmp_path / "float"
    converted.mkdir()
    proof = convert(FIXTURES / fixture, converted, ConvertConfig(target=target))
    assert proof.counts["linears"] == 14
    write_float(FIXTURES / fixture, plain)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 1024, size=length).tolist() for length in (5, 8, 16, 24, 32, 48)]
    write_safetensors(tmp_path / "windows", {"input_ids": np.zeros(2, np.int32), "offsets": np.array([0, 2])})
    job = {
        "checkpoint": str(plain), "generate": {"prompts": prompts, "new_tokens": MAX_TOKENS},
        "windows": str(tmp_path / "windows"), "output": str(tmp_path / "scores"),
    }  # fmt: skip
    expected = runner.run_worker(
        environments.ensure(root, "reference"), "quantline.toolchains.workers.reference.evaluate", job,
        log=tmp_path / "reference.log", threads=1, label="reference",
    ).data["generations"]  # fmt: skip
    with serve(pythons["vllm"], converted, OPTIONS, log=tmp_path / "server.log") as server:
        served = [greedy(server, prompt) for prompt in prompts]
    compared = 0
    for prompt, found, tokens, margins in zip(prompts, served, expected["tokens"], expected["margins"], strict=True):
        same = next((i for i, (a, b) in enumerate(zip(found, tokens, strict=True)) if a != b), MAX_TOKENS)
        compared += same
        parted = "" if same == MAX_TOKENS else f", parted at a margin of {margins[same]:.4f}"
        print(f"{target}: {len(prompt)} tokens of prompt, {same} of {MAX_TOKENS} greedy tokens equal{parted}")
        assert same == MAX_TOKENS or margins[same] < NEAR_TIE, f"parts at {same} with a margin of {margins[same]}"
    assert compared >= len(prompts) * MAX_TOKENS // 2


def greedy(server, prompt):
    request = {
        "model": SERVED_NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer = server.client(120).post("/v1/completions", json=request)
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]
