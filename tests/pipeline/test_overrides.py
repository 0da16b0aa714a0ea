from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.overrides import key_of, refuse_repeated, split, typed, with_home, with_variant


def test_the_option_of_an_override_is_known_in_all_of_hydras_forms():
    assert [key_of(one) for one in ("bits=8", "+a.b=1", "++a.b=x=y", "~a.b")] == ["bits", "a.b", "a.b", "~a.b"]


@pytest.mark.parametrize("line", ["bits=8 bits=4", "bits=8 +bits=8", "method=awq seed=1 method=gptq", "a.b=1 ++a.b=2"])
def test_an_option_that_is_given_twice_is_refused_with_both(line):
    first, *_, last = line.split()
    with pytest.raises(UserError) as caught:
        refuse_repeated(line.split())
    assert str(caught.value).startswith(f"{first} ")
    assert f"and {last}: both set" in str(caught.value)


def test_an_option_and_its_section_are_two_things():
    refuse_repeated(
        ["calibration=demo", "calibration.seed=1", "evaluate.window=1", "evaluate.stride=1", "--cfg", "job"]
    )


def test_the_override_that_decides_is_the_options_own_wherever_it_stands():
    assert typed(["model.path=A", "model=demo"], "model.path") == "model.path=A"
    assert typed(["model.path=A", "model=demo"], "model.repo") == "model=demo"
    assert typed(["modeling=1"], "model.repo") is None


@pytest.mark.parametrize("line", [5, ["bits=8"], {"bits": 8}])
def test_a_line_is_text(line):
    with pytest.raises(UserError, match=r"shared is .*; give overrides as one line of text"):
        split(line, "shared")


def test_a_command_that_says_the_same_twice_is_refused(root):
    command = [sys.executable, "-m", "stages.plan", "bits=8", "method=gptq", "bits=4"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: bits=8 and bits=4: both set bits; keep one of them\n")


def test_the_users_home_is_a_value_on_a_command_line_and_in_a_line_of_params(composed):
    assert with_home(["model.path=~/a b", "+x=~", "~speed", "name=a~b"]) == [
        'model.path="~/a b"', '+x="~"', "~speed", "name=a~b",
    ]  # fmt: skip
    (given,) = split("model.path=~/models/my-llama", "shared")
    assert composed(given)["model"]["path"] == "~/models/my-llama"


def test_a_command_takes_a_path_in_the_users_home(root, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-m", "stages.plan", "model.path=~/none", "method=rtn"],
        check=False, cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 2
    assert f"{tmp_path}/none: is not a folder" in told.stderr


def test_another_variant_keeps_what_was_typed_of_the_model_the_texts_and_the_server():
    given = [
        "model.path=/my model",
        "method=gptq",
        "bits=3",
        "++method.desc_act=true",
        "serve.dtype=float32",
        "convert.for=vllm",
    ]
    line = with_variant(given, "method=gptq bits=4 group_size=128 serve.dtype=bfloat16")
    assert line == "'model.path=/my model' convert.for=vllm method=gptq bits=4 group_size=128 serve.dtype=bfloat16"
    assert with_variant(["layers=mixed", "layers.gate=x"], "method=rtn layers=uniform") == "method=rtn layers=uniform"
    assert with_variant([], "method=float") == "method=float"
