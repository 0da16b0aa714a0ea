"""`python -m stages.plan` as it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hub_server import COMMIT, Hub, serving
from tiny_quantized import write_float

from quantline.serving.rules import cpu_instructions

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_float(tmp_path_factory.mktemp("m") / "tiny", layers=2)


def plan(root, *arguments, **environment):
    command = [sys.executable, "-m", "stages.plan", *map(str, arguments)]
    known = {**os.environ, **environment}
    return subprocess.run(command, cwd=root, env=known, capture_output=True, text=True, check=False)


# The tiny model takes 64 tokens.
SHORT = ["evaluate.window=32", "calibration.seq_len=32", "speed.input_tokens=32"]


def on(model, *arguments):
    return ["model=custom", f"model.path={model}", "calibration=demo", "device=cpu", *SHORT, *arguments]


@pytest.mark.usefixtures("serves_4_bits")  # another variant is the nearest elsewhere
def test_a_good_variant_is_ok_and_its_json_holds_its_sizes(root, model):
    done = plan(root, *on(model, "json=true", "context=64", "batch=2"))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["verdict"], found["findings"], found["nearest"]) == ("ok", [], None)
    sizes = found["sizes"]
    assert sizes["weights"] == sizes["codes"] + sizes["scales"] + sizes["zeros"] + sizes["other"] + sizes["left_float"]
    assert sizes["kv_cache"] == 64 * 2 * sizes["kv_cache_per_token"]
    assert found["recommendation"] is None


@pytest.mark.usefixtures("serves_4_bits")  # another variant is the nearest elsewhere
def test_a_wrong_combination_is_refused_with_its_rule_and_the_nearest_that_works(root, model):
    done = plan(root, *on(model, "method=gptq", "bits=8"))
    assert done.returncode == 2
    assert "REFUSED (gptq-cpu-bits)" in done.stdout
    assert "source: ran: 0.32.0 on CPU" in done.stdout
    line = done.stderr.partition("the nearest that works: ")[2].split()  # as it can be typed, so with the model
    assert line == [*on(model), "method=gptq", "bits=4", "group_size=128"]
    assert "Traceback" not in done.stderr
    assert plan(root, *line).returncode == 0


def test_what_no_configuration_allows_gets_a_nearest_variant_too(root, model):
    done = plan(root, *on(model, "method=awq", "bits=8"))
    assert done.returncode == 2
    assert "bits=8: awq takes 4" in done.stderr
    # Where vLLM serves no 4 bits, another variant is the nearest.
    nearest = "method=" if cpu_instructions() in ("avx2", "none") else "method=awq bits=4 group_size=128"
    assert f"the nearest that works: {' '.join(on(model))} {nearest}" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_and_criticality_give_a_recommendation_for_a_gpu(root, model):
    arguments = ["model=custom", f"model.path={model}", "calibration=demo", *SHORT, "gpu_memory_gb=24", "critical=true"]
    done = plan(root, *arguments)
    assert done.returncode == 0
    assert "recommended, least loss: method=gptq bits=8 group_size=128" in done.stdout
    assert "fits in 24 GiB" in done.stdout
    found = json.loads(plan(root, *arguments, "json=true").stdout)
    assert found["target"]["device"] == "cuda"
    assert found["recommendation"]["best"] == "method=gptq bits=8 group_size=128"
    assert len(found["recommendation"]["choices"]) >= 8


def test_a_model_that_was_not_downloaded_names_the_command(root):
    done = plan(root, "model=qwen2_5_3b", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "python -m stages.download model=qwen2_5_3b" in done.stderr


@pytest.mark.usefixtures("serves_4_bits")  # another variant is the nearest elsewhere
def test_a_model_on_the_hub_is_planned_from_its_headers_before_it_is_downloaded(root, model, tmp_path):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with serving(Hub({("models", "owner/tiny"): files})) as hub:
        there = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", "HF_HUB_CACHE": ""}
        done = plan(root, "model.repo=owner/tiny", "device=cpu", "calibration=demo", *SHORT, "method=gptq", **there)
        weights = [name for name in files if name.endswith(".safetensors")]
        assert done.returncode == 0, done.stderr
        assert f"note: planned at the newest commit; the stages take it with model.revision={COMMIT}" in done.stderr
        assert {one for name in weights for one in hub.gets(name)} == {"bytes=0-100000"}
        local = plan(root, *on(model, "method=gptq", "json=true"))
        pinned = plan(root, "model.repo=owner/tiny", f"model.revision={COMMIT}", "device=cpu", *SHORT,
                      "calibration=demo", "method=gptq",
                      "json=true", **there)  # fmt: skip
    assert json.loads(pinned.stdout)["sizes"] == json.loads(local.stdout)["sizes"]


def test_texts_that_are_not_here_are_refused_all_at_once_with_what_the_model_does_not_take(root, model):
    files = ["calibration=jsonl", "calibration.path=/no/such.txt", "evaluate.path=no.jsonl"]
    lengths = ["evaluate.window=64", "calibration.seq_len=32", "speed.input_tokens=32"]
    done = plan(root, "model=custom", f"model.path={model}", "device=cpu", "method=rtn", *files, *lengths)
    assert done.returncode == 2
    assert "evaluate.window=64: the model takes at most 64 tokens" in done.stdout
    assert "REFUSED (file): calibration.path=/no/such.txt: does not exist" in done.stdout
    assert "REFUSED (file): evaluate.path=no.jsonl: does not exist (looked in" in done.stdout
    assert "this variant is refused (length, file)" in done.stderr


def test_texts_that_the_model_does_not_take_are_refused_before_anything_runs(root, model):
    done = plan(
        root, "model=custom", f"model.path={model}", "device=cpu", "method=rtn", "speed=none", "evaluate.window=512"
    )
    assert done.returncode == 2
    assert (
        "evaluate.window=512: the model takes at most 64 tokens, and the server one more than a window" in done.stdout
    )
    # Its linears are measured on calibration samples, though rounding needs none.
    assert "calibration.seq_len=512: the model takes at most 64 tokens" in done.stdout
    fits = "evaluate.window=63 calibration.seq_len=64"
    assert f"this variant is refused (length); all that it takes: {fits}" in done.stderr

    assert "this variant is refused (length)" in done.stderr


def test_a_window_that_was_not_given_follows_the_model_and_plan_says_so(root, model):
    options = ["device=cpu", "method=rtn", "speed=none", "calibration.seq_len=64"]
    done = plan(root, "model=custom", f"model.path={model}", "calibration=demo", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluate.window=auto: 63 tokens, since the model takes 64" in done.stdout


def test_a_variant_of_params_is_planned_by_its_name(root):
    done = plan(root, "variant=gptq-w4-g128", "json=true")
    found = json.loads(done.stdout)
    assert (found["variant"]["method"], found["variant"]["bits"]) == ("gptq", 4)
    other = plan(root, "variant=gptq-w4-g12")
    assert other.returncode == 2
    assert (
        "is not in params.yaml, which has float, awq-w4-g128, gptq-w4-g128, gptq-w8-g128 (did you mean" in other.stderr
    )
    assert "give either its name, or options" in plan(root, "variant=gptq-w4-g128", "bits=8").stderr
