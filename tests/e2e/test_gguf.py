"""A GGUF variant of the demo model by hand, through every stage up to its evaluation, and what tasks and speed say of it."""

from __future__ import annotations

import json
import shutil

import pytest
from checkout import SHARED

from quantline.toolchains import environments

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

OPTIONS = [*SHARED, "tracking.enabled=false", "method=gguf", "method.type=IQ4_XS", "variant=iq4"]


@pytest.fixture(scope="module")
def made(bare, root):
    environments.ensure(root, "llamacpp")
    done = bare.run("python", "-m", "stages.run", *OPTIONS)
    assert done.code == 0, done.text
    yield bare.root / "scratch" / "iq4"
    shutil.rmtree(bare.root / "scratch", ignore_errors=True)


def result(folder, stage):
    return json.loads((folder / f"{stage}.json").read_text())


def test_the_stages_are_those_of_every_variant_and_the_types_are_in_the_result(made):
    table = result(made, "quantize")["tables"]["layers"]
    assert {row["type"] for row in table} <= {"IQ4_XS", "IQ4_NL", "Q5_K", "Q5_1", "Q5_0"}
    assert any("no multiple of 256" in warning for warning in result(made, "quantize")["warnings"])
    assert result(made, "quantize")["metrics"]["effective_bits"] < 5
    served = result(made, "serve_smoke")
    assert (served["status"], served["environment"]["toolchain"]) == ("ok", "llamacpp")
    assert (made / "convert" / "model.gguf").is_file()


def test_llama_cpp_and_the_reference_engine_agree_and_the_loss_is_that_of_four_bits(made):
    metrics = result(made, "evaluate")["metrics"]
    assert 1 < metrics["perplexity_ratio"] < 1.06
    assert metrics["engine_relative_difference"] < 0.01
    assert metrics["top1_agreement"] > 0.8


def test_tasks_ask_the_reference_engine_alone_and_say_why(bare, made):
    asked = ["tasks=demo", "tasks.limit=8"]
    rest = [option for option in OPTIONS if option != "tasks=none"]
    baseline = [option for option in rest if not option.startswith(("method", "variant"))]
    done = bare.run("python", "-m", "stages.tasks", *baseline, *asked, "method=float")
    assert done.code == 0, done.text
    done = bare.run("python", "-m", "stages.tasks", *rest, *asked)
    assert done.code == 0, done.text
    assert any("no log-probabilities of a prompt" in warning for warning in result(made, "tasks")["warnings"])


def test_speed_leaves_it_out_and_says_why(bare, made):
    done = bare.run("python", "-m", "stages.speed", *(one for one in OPTIONS if one != "speed=none"), "speed=short")
    assert done.code == 0, done.text
    speed = result(made, "speed")
    assert speed["status"] == "unsupported"
    assert "served by llama.cpp and the float model by vLLM" in speed["reason"]
