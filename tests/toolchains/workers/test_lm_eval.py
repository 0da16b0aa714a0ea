"""The harness itself, in its environment: both engines on the demo model, and the standard tasks up to their data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sections

from quantline.config.tasks import LastWordConfig, LocalTasksConfig, MultipleChoiceConfig
from quantline.core import files
from quantline.core.errors import UserError
from quantline.evaluation.tasks import run as tasks
from quantline.serving.server import serve
from quantline.toolchains import environments, runner

pytestmark = [pytest.mark.toolchain("lm_eval"), pytest.mark.toolchain("vllm")]

ITEMS = 12
JOB = {
    "device": "cpu", "threads": 2, "seed": 0, "batch_size": 8, "concurrency": 4, "timeout_seconds": 300, "download": False,
    "max_length": 512,
}  # fmt: skip
STANDARD = ("arc_challenge", "arc_easy", "gsm8k", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande")


@pytest.fixture(scope="module")
def worker(root, tmp_path_factory):
    toolchain = environments.ensure(root, "lm_eval")
    log = tmp_path_factory.mktemp("log") / "worker.log"

    def run_worker(job):
        return runner.run_worker(
            toolchain, "quantline.toolchains.workers.lm_eval", job, log=log, threads=2, label="tasks",
            extra_environment={"HF_HOME": str(log.parent / "empty")},
        )  # fmt: skip

    return run_worker


@dataclass
class Asking:
    report: tasks.TasksReport
    written: dict[str, Any]
    samples: dict[str, dict[str, list[dict[str, Any]]]]
    out: Path


@pytest.fixture(scope="module")
def both(root, worker, tmp_path_factory):
    """The demo model, asked by both engines in float32: what is left between them is how they compute."""
    model = root / "assets" / "demo" / "model"
    local = LocalTasksConfig(
        last_word=LastWordConfig(context_words=24),
        multiple_choice=MultipleChoiceConfig(context_words=16, choices=3, continuation_words=6),
    )
    asked = sections.tasks(
        local=local, path="assets/demo/evaluation.jsonl", limit=ITEMS, engines=["reference", "vllm"],
        gate=sections.gate(0.95, "low", "fail"),
    )  # fmt: skip
    items = tasks.local_items(asked, root)
    out = tmp_path_factory.mktemp("tasks")
    python = environments.ensure(root, "vllm").python
    options = sections.server(dtype="float32", max_model_len=512, kv_cache_gib=0.25)
    report = tasks.evaluate(
        asked, items, job={**JOB, "checkpoint": str(model)}, run_worker=worker, refused="", baseline=None, out=out,
        server=lambda: serve(python, model, options, log=out / "server.log"),
    )  # fmt: skip
    samples = {engine: tasks.read_samples(out / f"samples-{engine}.jsonl") for engine in ("reference", "vllm")}
    return Asking(report, json.loads((out / "tasks.json").read_text()), samples, out)


def test_both_engines_answer_every_item_of_both_tasks(both):
    rows = {(row["task"], row["engine"]): row for row in both.written["rows"]}
    assert set(rows) == {
        (task, engine) for task in ("last_word", "multiple_choice") for engine in ("reference", "vllm")
    }
    for row in rows.values():
        assert (row["n"], row["recovery"], row["recovery_low"]) == (ITEMS, 1, 1)
    assert rows["multiple_choice", "reference"]["metric"] == "acc_norm"
    # A third is what chance gives.
    assert rows["multiple_choice", "reference"]["value"] > 0.4
    assert 0 < rows["last_word", "reference"]["value"] < 1
    assert both.written["gate"]["passed"] is True


def test_the_engines_give_the_same_log_likelihoods_and_the_same_answers(both):
    compared = 0
    for task in ("last_word", "multiple_choice"):
        pairs = zip(both.samples["reference"][task], both.samples["vllm"][task], strict=True)
        for one, other in pairs:
            assert (one["item"], one["hash"]) == (other["item"], other["hash"])
            assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=2e-3)
            compared += len(one["loglikelihoods"])
    assert compared == ITEMS * (1 + 3)
    assert both.written["engines"] == [{"task": "last_word", "same": 1}, {"task": "multiple_choice", "same": 1}]


def test_the_items_are_kept_and_known_by_their_hash(both):
    assert set(both.written["items"]) == {"last_word", "multiple_choice"}
    for name, sha256 in both.written["items"].items():
        path = both.out / "items" / f"{name}.jsonl"
        assert files.sha256_of(path) == sha256
        assert len(path.read_text().splitlines()) == ITEMS


def test_standard_tasks_are_known_by_name_and_refused_by_their_data_sets_where_there_is_no_cache(worker, tmp_path):
    questions = [{"name": name, "num_fewshot": None, "limit": 2} for name in (*STANDARD, "hellaswagg")]
    job = {**JOB, "engine": "check", "tasks": questions, "local": None, "output": str(tmp_path / "none")}
    with pytest.raises(UserError, match="these tasks cannot be run") as caught:
        worker(job)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(questions)
    (unknown,) = [line for line in lines if "no such task" in line]
    assert "tasks.standard.hellaswagg" in unknown
    assert "did you mean hellaswag" in unknown
    for name, data in (("hellaswag", "Rowan/hellaswag"), ("mmlu", "cais/mmlu"), ("gsm8k", "openai/gsm8k"),
                       ("arc_easy", "allenai/ai2_arc"), ("winogrande", "winogrande")):  # fmt: skip
        (line,) = [line for line in lines if line.strip().startswith(f"{name}: ")]
        assert data in line
        assert "HF_HOME or HF_DATASETS_CACHE" in line
    assert "Traceback" not in str(caught.value)
