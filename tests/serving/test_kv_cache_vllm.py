"""A KV cache with which the real server computes wrongly: answers are fluent, and the comparison of engines finds it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import sections
from checkout_paths import DEMO_MODEL as MODEL
from checkout_paths import interpreter
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from quantline.core.errors import QuantlineError
from quantline.evaluation.perplexity import check_engines
from quantline.serving.logprobs import score
from quantline.serving.rules import CheckpointFacts, Target, verdict
from quantline.serving.server import serve
from quantline.toolchains import environments, runner

WINDOWS, LENGTH = 4, 256
TOLERANCE = 0.01  # evaluate.engine_tolerance


def test_types_of_the_cache_that_a_cpu_computes_wrongly_are_refused_and_others_are_not():
    cpu = Target("vllm", "0.32.0", "cpu", "bfloat16")
    for dtype, rule in [(None, ""), ("fp8", ""), ("fp8_e5m2", ""), ("int8_per_token_head", "kv-cache-cpu")]:
        assert verdict(replace(cpu, kv_cache_dtype=dtype), CheckpointFacts("float")).rule_id == rule
    gpu = Target("vllm", "0.32.0", "cuda", "bfloat16", kv_cache_dtype="int8_per_token_head")
    assert verdict(gpu, CheckpointFacts("float")).supported


@pytest.mark.toolchain("vllm")
@pytest.mark.toolchain("reference")
def test_the_comparison_of_engines_finds_a_cache_that_is_computed_wrongly(root, tmp_path):
    """Seen: perplexity 161 for 11.5 with int8_per_token_head, and no error or warning in the server's log."""
    tokenizer, ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")), []
    with (root / "assets" / "demo" / "evaluation.jsonl").open() as file:
        while len(ids) < WINDOWS * LENGTH:
            ids += [*tokenizer.encode(json.loads(next(file))["text"]).ids, 0]
    windows = np.array(ids[: WINDOWS * LENGTH], dtype=np.int32).reshape(WINDOWS, LENGTH)
    offsets = np.arange(WINDOWS + 1, dtype=np.int64) * LENGTH
    save_file({"input_ids": windows.reshape(-1), "offsets": offsets}, tmp_path / "windows.safetensors")
    job = {
        "checkpoint": str(MODEL),
        "windows": str(tmp_path / "windows.safetensors"),
        "output": str(tmp_path / "scores"),
    }
    runner.run_worker(
        environments.ensure(root, "reference"), "quantline.toolchains.workers.reference.evaluate", job,
        log=tmp_path / "log", threads=1, label="reference",
    )  # fmt: skip
    expected = load_file(tmp_path / "scores")["logprobs"].reshape(WINDOWS, LENGTH)[:, 1:]
    options = sections.server(
        dtype="bfloat16", max_model_len=LENGTH + 1, kv_cache_gib=0.25, threads=1, kv_cache_dtype="int8_per_token_head"
    )
    with serve(interpreter("vllm"), MODEL, options, log=tmp_path / "server.log") as server:
        found = np.stack(score(server, list(windows)))
        text = server.client().post(
            "/v1/completions", json={"model": "quantline", "prompt": "In Python, a list is", "max_tokens": 16}
        ).json()["choices"][0]["text"]  # fmt: skip
    difference = float(np.expm1(expected.mean() - found.mean()))
    print(f"perplexity {100 * difference:+.0f} %; it answers {text!r}")
    assert len(text.split()) > 2
    with pytest.raises(QuantlineError, match="computes something else than was quantized"):
        check_engines(difference, TOLERANCE)
