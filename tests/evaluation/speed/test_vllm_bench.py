"""How vLLM's benchmark tools are called, and what is made of the JSON that they save."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import sections

from quantline.core.errors import ServerError
from quantline.evaluation.speed.vllm_bench import (
    Subject,
    offline_arguments,
    offline_row,
    serve_arguments,
    serve_row,
)

PLAN = sections.speed((8, 16), seed=3)
LEVEL = PLAN.levels[0]
SUBJECT = Subject("variant", Path("/model"), sections.server(dtype="float16", max_model_len=128, kv_cache_gib=0.5))
# The fields of what `vllm bench serve` 0.32.0 saved, shortened.
SAVED = {
    "completed": 16, "failed": 0, "total_input_tokens": 1024, "total_output_tokens": 512, "duration": 4.0,
    "request_throughput": 4.0, "output_throughput": 128.0, "total_token_throughput": 384.0, "median_ttft_ms": 50.0,
    "p99_ttft_ms": 90.0, "mean_ttft_ms": 55.0, "median_tpot_ms": 7.0, "median_itl_ms": 6.5, "p99_itl_ms": 20.0,
    "median_e2el_ms": 300.0,
}  # fmt: skip


def values_of(arguments):
    return {name: value for name, value in itertools.pairwise(arguments) if name.startswith("--")}


def test_the_server_is_asked_for_random_prompts_of_fixed_length_and_seed_after_a_warm_up():
    arguments = serve_arguments(SUBJECT, "http://127.0.0.1:1", LEVEL, PLAN, Path("/out/x.json"))
    assert arguments[:2] == ["bench", "serve"]
    assert {"--ignore-eos", "--save-result"} <= set(arguments)
    found = values_of(arguments)
    assert (found["--random-input-len"], found["--random-output-len"], found["--seed"]) == ("64", "32", "3")
    assert (found["--max-concurrency"], found["--num-prompts"], found["--num-warmups"]) == ("8", "16", "8")
    assert (found["--result-dir"], found["--result-filename"]) == ("/out", "x.json")
    assert found["--tokenizer"] == "/model"


def test_a_saved_result_becomes_a_row():
    row = serve_row(SAVED, "variant", LEVEL, PLAN)
    assert (row["model"], row["concurrency"]) == ("variant", 8)
    assert (row["output_tokens_per_second"], row["request_throughput"]) == (128.0, 4.0)
    assert (row["ttft_ms_median"], row["ttft_ms_p99"]) == (50.0, 90.0)
    assert (row["itl_ms_median"], row["itl_ms_p99"], row["tpot_ms_median"]) == (6.5, 20.0, 7.0)
    assert row["latency_ms_median"] == 300.0


@pytest.mark.parametrize("change", [{"completed": 15}, {"total_output_tokens": 511}, {"completed": None}])
def test_failed_requests_and_short_answers_are_no_measurement(change):
    with pytest.raises(ServerError, match=r"of 16 requests were answered.*512 were asked for"):
        serve_row({**SAVED, **change}, "variant", LEVEL, PLAN)


def test_a_field_that_this_vllm_does_not_save_is_named():
    with pytest.raises(ServerError, match="has no median_itl_ms"):
        serve_row({name: value for name, value in SAVED.items() if name != "median_itl_ms"}, "float", LEVEL, PLAN)


def test_the_offline_tools_load_the_model_as_the_server_does():
    for tool in ("latency", "throughput"):
        found = values_of(offline_arguments(tool, SUBJECT, LEVEL, PLAN, Path("/out/x.json")))
        assert (found["--model"], found["--dtype"], found["--max-model-len"]) == ("/model", "float16", "128")
        assert found["--output-json"] == "/out/x.json"
        assert int(found["--kv-cache-memory-bytes"]) == 2**29
        assert "--kv-cache-dtype" not in found
        kept = replace(SUBJECT, options=replace(SUBJECT.options, kv_cache_dtype="fp8"))
        found = values_of(offline_arguments(tool, kept, LEVEL, PLAN, Path("/out/x.json")))
        assert found["--kv-cache-dtype"] == "fp8"
        whole = replace(SUBJECT, options=replace(SUBJECT.options, text_only=True))
        assert "--language-model-only" in offline_arguments(tool, whole, LEVEL, PLAN, Path("/out/x.json"))
        assert "--language-model-only" not in offline_arguments(tool, SUBJECT, LEVEL, PLAN, Path("/out/x.json"))
    assert values_of(offline_arguments("latency", SUBJECT, LEVEL, PLAN, Path("x")))["--batch-size"] == "8"
    assert values_of(offline_arguments("throughput", SUBJECT, LEVEL, PLAN, Path("x")))["--num-prompts"] == "16"


def test_output_tokens_a_second_of_the_offline_tools_leave_the_prompts_out():
    latency = offline_row("latency", {"avg_latency": 2.0, "latencies": [1.5, 2.5]}, "float", LEVEL, PLAN)
    assert latency["output_tokens_per_second"] == 8 * 32 / 2.0
    assert (latency["seconds_low"], latency["seconds_high"]) == (1.5, 2.5)
    saved = {"elapsed_time": 4.0, "total_num_tokens": 16 * 96, "tokens_per_second": 384.0}
    assert offline_row("throughput", saved, "float", LEVEL, PLAN)["output_tokens_per_second"] == 16 * 32 / 4.0
