"""vLLM's own benchmark against real servers of the demo model, which here plays float and variant."""

from __future__ import annotations

import json
import math

import psutil
import pytest
import sections
from checkout_paths import DEMO_MODEL as MODEL
from checkout_paths import interpreter

from quantline.evaluation.speed.run import Subject, measure, tensor_bytes
from quantline.evaluation.speed.vllm_bench import MEASURED
from quantline.serving.server_log import weights_bytes
from quantline.toolchains.runner import run_worker
from quantline.toolchains.toolchain import Toolchain

PYTHON = interpreter("vllm")
PLAN = sections.speed((1, 2), (4, 4), input_tokens=24, output_tokens=6, rounds=1, side_by_side="always")

pytestmark = [
    pytest.mark.toolchain("vllm"),
]


def test_a_model_against_itself_is_measured_by_vllm_in_turns_with_its_memory_beside_it(tmp_path):
    out, log = tmp_path / "out", tmp_path / "speed.log"
    out.mkdir()
    options = sections.server(dtype="bfloat16", max_model_len=64, kv_cache_gib=0.25, threads=1)
    labels = []

    def bench(job, label):
        labels.extend(run["label"] for run in job["runs"])
        worker = Toolchain("vllm", PYTHON, None)
        return run_worker(worker, "quantline.toolchains.workers.vllm_bench", job, log=log, threads=1, label=label)

    before = set(psutil.Process().children(recursive=True))
    found = measure(
        python=PYTHON, version="0.32.0", subjects=(Subject("float", MODEL, options), Subject("variant", MODEL, options)),
        plan=PLAN, bench=bench, out=out, log=log,
    )  # fmt: skip
    assert set(psutil.Process().children(recursive=True)) <= before
    assert [label.split(",")[0] for label in labels] == ["float", "variant"] * 2
    document = found.document
    assert json.loads((out / "speed.json").read_text()) == document
    assert [(row["concurrency"], row["model"]) for row in document["rows"]] == [
        (1, "float"), (1, "variant"), (4, "float"), (4, "variant")
    ]  # fmt: skip
    for row in document["rows"]:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in MEASURED), row
    # How fast it was is no matter of a test: a machine that others use may slow one of two turns tenfold.
    for ratio in document["ratios"]:
        assert 0 < ratio["low"] == ratio["high"] == pytest.approx(ratio["speed_up"])  # of one round
    assert [server["model"] for server in document["servers"]] == ["float", "variant"]
    for server in document["servers"]:
        assert server["weights_memory_bytes"] == tensor_bytes(MODEL)
        assert server["weights_memory_logged"] is False
        assert 2e8 < server["peak_memory_bytes"] < 2e10
        assert server["load_seconds"] > 1
        assert server["gpu_memory_bytes"] is None
    # What this build does not report is taken from the checkpoint, and said so.
    assert weights_bytes((tmp_path / "speed.float.log").read_text()) is None
    assert "reports none" in document["session"]["weights_memory_is"]
    assert {path.name for path in (out / "bench").iterdir()} == {
        f"serve-{model}-c{level}-round1.json" for model in ("float", "variant") for level in (1, 4)
    }  # fmt: skip
    raw = json.loads((out / "bench" / "serve-float-c4-round1.json").read_text())
    assert (raw["completed"], raw["total_output_tokens"], raw["max_concurrency"]) == (4, 24, 4)
    assert found.metrics["output_tokens_per_second_c4"] > 0
