from __future__ import annotations

import json

import fake_server
import numpy as np
import pytest
import sections

from quantline.core.errors import ServerError, UserError
from quantline.data.windows import Windows
from quantline.evaluation.perplexity import load_server_scores
from quantline.serving.rules import checkpoint_facts, facts_of, serving_dtype
from quantline.serving.serve_smoke import Asked, read_answers, serve_and_score
from quantline.serving.server import Vllm

LENGTH, COUNT = 12, 5
IDS = (np.arange(LENGTH * COUNT, dtype=np.int32) * 7) % 40
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True, "desc_act": False}


def windows_of(length=LENGTH):
    offsets = np.arange(0, len(IDS) + 1, length, dtype=np.int64)
    count = len(offsets) - 1
    return Windows(
        IDS, offsets, np.arange(count, dtype=np.int32), np.ones(count, np.int32), tuple(map(str, range(count))), {}
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that nothing reads but its config."""

    def of(quantization=None, template="{{ messages }}"):
        folder = tmp_path / "model"
        folder.mkdir()
        config = {"model_type": "qwen2"} | ({"quantization_config": quantization} if quantization else {})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
        return folder

    return of


@pytest.fixture
def serve(tmp_path):
    def of(model, fault="", windows=None, baseline=None, max_model_len=16, **changes):
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        out.mkdir()
        options = sections.server(
            environment={"FAULT": fault}, startup_timeout_seconds=20.0, request_timeout_seconds=5.0,
            max_model_len=max_model_len, dtype="float16",
        )  # fmt: skip
        served = serve_and_score(
            Vllm(changes.get("python") or fake_server.interpreter(tmp_path), "0.32.0"), model, options,
            asked=Asked(sections.smoke(), *changes.get("continued", ())), windows=windows or windows_of(),
            baseline=baseline, out=out, log=tmp_path / "server.log",
        )  # fmt: skip
        return served, out

    return of


def test_quantized_models_are_served_in_float16_and_the_float_model_in_bfloat16():
    assert serving_dtype("auto", quantized=True) == "float16"
    assert serving_dtype("auto", quantized=False) == "bfloat16"
    assert serving_dtype("float32", quantized=True) == "float32"
    assert serving_dtype("auto", quantized=True, architecture="LlamaForCausalLM") == "float16"
    assert serving_dtype("auto", quantized=True, architecture="Gemma2ForCausalLM") == "bfloat16"


def test_a_float_checkpoint_has_no_facts_of_quantization(checkpoint):
    assert checkpoint_facts(checkpoint()) == facts_of(None)


def test_the_facts_of_a_quantized_checkpoint_are_those_of_its_config(checkpoint):
    assert checkpoint_facts(checkpoint(GPTQ)) == facts_of(GPTQ)
    assert facts_of(GPTQ) != facts_of(None)


def test_what_the_target_cannot_take_is_told_without_a_server(serve, checkpoint, tmp_path):
    served, out = serve(checkpoint(GPTQ), python=tmp_path / "no-such-python")
    assert "4 bits only" in served.reason
    assert served.metrics == {}
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["supported"] is False
    assert verdict["reason"] == served.reason
    assert verdict["rule"]
    assert read_answers(out) == []
    assert load_server_scores(out, windows_of()) is None


def test_prompts_are_continued_where_that_is_asked_for(serve, checkpoint):
    model = checkpoint()
    _, out = serve(model)
    assert not (out / "generations.json").exists()
    _, out = serve(model, continued=([[1, 2], [1, 5]], 2))
    found = json.loads((out / "generations.json").read_text())
    assert (found["engine"], found["tokens"]) == ("vllm", [[3, 4], [6, 7]])
    _, out = serve(model, continued=([[1, 2], [1, 5]], 15))
    assert not (out / "generations.json").exists(), "the server takes 16 tokens"


def test_a_window_that_the_server_cannot_take_is_refused_before_it_starts(serve, checkpoint, tmp_path):
    with pytest.raises(
        UserError, match=r"evaluate\.window=12: .*serve\.max_model_len=12; raise that or shorten the window"
    ):
        serve(checkpoint(), max_model_len=12, python=tmp_path / "no-such-python")


def test_a_served_model_gives_answers_and_a_score_for_every_token_but_a_windows_first(serve, checkpoint):
    served, out = serve(checkpoint())
    assert served.reason == ""
    assert served.metrics["load_seconds"] > 0
    assert [answer.kind for answer in read_answers(out)] == ["completion", "completion", "chat"]
    logprobs = load_server_scores(out, windows_of())
    assert logprobs.dtype == np.float32
    first = np.zeros(len(IDS), bool)
    first[::LENGTH] = True
    assert np.isnan(logprobs[first]).all()
    np.testing.assert_allclose(logprobs[~first], -IDS[~first] / 10, rtol=1e-6)
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["supported"] is True
    assert verdict["flags"] == list(served.flags)
    assert verdict["flags"][:2] == ["--dtype", "float16"]


def test_a_model_without_a_chat_template_is_asked_no_chat_questions(serve, checkpoint):
    _, out = serve(checkpoint(template=None))
    assert [answer.kind for answer in read_answers(out)] == ["completion", "completion"]


def test_an_answer_may_be_as_poor_as_the_float_models_but_no_poorer(serve, checkpoint, tmp_path):
    model = checkpoint()
    _, baseline = serve(model)
    served, _ = serve(model, baseline=baseline)
    assert served.reason == ""


def test_a_fault_of_the_server_is_an_error_that_names_its_log(serve, checkpoint, tmp_path):
    with pytest.raises(ServerError, match="the served model's answers cannot be accepted") as caught:
        serve(checkpoint(), fault="streams_otherwise")
    assert f"log: {tmp_path / 'server.log'}" in str(caught.value)
    assert not list((tmp_path / "out-0").iterdir())


def test_a_server_that_dies_while_it_loads_is_an_error_with_its_reason(serve, checkpoint, tmp_path):
    with pytest.raises(ServerError, match="the weights are odd"):
        serve(checkpoint(), fault="dies")
    assert not list((tmp_path / "out-0").iterdir())
