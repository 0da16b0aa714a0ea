"""llama.cpp's server and scores: the demo model in GGUF is served, answered, and scored as the reference engine does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import sections
from demo_gguf import REFERENCE, demo_gguf, runner

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.safetensors_file import SafetensorsFile
from quantline.core.errors import ServerError
from quantline.data.windows import build_windows
from quantline.serving import llamacpp
from quantline.serving.serve_smoke import Asked, serve_and_score
from quantline.serving.server import Vllm, serve
from quantline.toolchains import environments
from quantline.toolchains.workers.llamacpp import scoring
from quantline.toolchains.workers.llamacpp import server as worker

pytestmark = pytest.mark.toolchain("llamacpp")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return runner(root, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def checkpoint(root, run, tmp_path_factory):
    return demo_gguf(root, run, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def windows(root, checkpoint):
    return build_windows(
        checkpoint, sections.evaluation(path=str(root / "assets/demo/evaluation.jsonl"), max_tokens=1500)
    )


@pytest.fixture(scope="module")
def served(root, run, checkpoint, windows, tmp_path_factory):
    out = tmp_path_factory.mktemp("served")
    python = environments.ensure(root, "llamacpp").python
    options = sections.server(runtime="llamacpp", max_model_len=600, threads=1, concurrency=2)
    questions = sections.smoke(prompts=["The SELECT statement is used to"], chat_prompts=["What is an index?"])
    report = serve_and_score(
        Vllm(python, "2026.10.11549", run_worker=run), checkpoint, options, asked=Asked(questions), windows=windows,
        baseline=None, out=out, log=out / "server.log",
    )  # fmt: skip
    return out, report


def test_the_file_is_served_and_answers_every_question(served):
    out, report = served
    assert report.reason == ""
    assert report.metrics["output_tokens_per_second"] > 0
    answers = json.loads((out / "answers.json").read_text())
    assert [answer["kind"] for answer in answers] == ["completion", "chat"]
    assert all(answer["token_count"] > 1 for answer in answers)
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["supported"]
    assert "--no-cache-prompt" in verdict["flags"]
    assert "no log-probabilities of a prompt" in verdict["prompt_scores"]


def test_its_scores_are_those_of_the_reference_engine_up_to_the_rounding_of_inputs(
    run, checkpoint, windows, served, tmp_path
):
    own = SafetensorsFile.open(served[0] / "scores.safetensors").read("logprobs")
    given = tmp_path / "windows.safetensors"
    write_safetensors(given, {"input_ids": windows.input_ids, "offsets": windows.offsets})
    job = {
        "checkpoint": str(checkpoint), "windows": str(given), "output": str(tmp_path / "scores"), "device": "cpu",
        "threads": 1, "batch_tokens": 1024,
    }  # fmt: skip
    run("reference", f"{REFERENCE}.evaluate", job)
    reference = SafetensorsFile.open(tmp_path / "scores").read("logprobs")
    np.testing.assert_array_equal(np.isnan(own), np.isnan(reference))
    assert np.isnan(own).sum() == len(windows.offsets) - 1
    assert abs(np.nanmean(own) - np.nanmean(reference)) < 0.01
    assert np.nanmax(np.abs(own - reference)) > 1e-4  # another engine, which rounds inputs to 8 bits


def test_a_damaged_file_ends_the_server_with_the_reason(root, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    data = (broken / "model.gguf").read_bytes()
    (broken / "model.gguf").write_bytes(data[: len(data) // 2])
    python = environments.ensure(root, "llamacpp").python
    options = sections.server(runtime="llamacpp", max_model_len=64, threads=1)
    with pytest.raises(ServerError, match="log: "), serve(python, broken, options, log=tmp_path / "log"):
        pass


def test_options_that_the_server_does_not_have_are_refused(capsys):
    with pytest.raises(SystemExit):
        worker.options_of(["--model", "m", "--alias", "a", "--port", "1", "--no-such-option"])
    assert "--no-such-option" in capsys.readouterr().err


def test_the_options_are_those_of_llama_cpps_program():
    found = worker.options_of(["--model", "m", "--alias", "a", "--port", "1", "--ctx-size", "64", "--no-cache-prompt"])
    assert (found.model, found.alias, found.host, found.ctx_size, found.no_cache_prompt) == (
        "m",
        "a",
        "127.0.0.1",
        64,
        True,
    )
    assert worker.__name__ == llamacpp.MODULE
    assert scoring.__name__ == llamacpp.SCORING
