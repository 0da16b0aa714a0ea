"""`python -m stages.plan` as it is called."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_quantized import write_float

from quantline.core.errors import ConfigError
from quantline.pipeline.command_line import read
from quantline.pipeline.config import parse
from quantline.pipeline.preflight import PlanOptions, plan_options, preflight
from quantline.pipeline.run import StageRun
from quantline.planning.spec import RefusedError
from quantline.serving.rules import cpu_instructions
from stages.plan import OPTIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_float(tmp_path_factory.mktemp("m") / "tiny", layers=2)


def plan(root, *arguments):
    command = [sys.executable, "-m", "stages.plan", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def on(model, *arguments):
    return ["model=custom", f"model.path={model}", "device=cpu", *arguments]


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
    assert "the nearest that works: method=gptq bits=4 group_size=128" in done.stderr
    assert "Traceback" not in done.stderr
    assert plan(root, *on(model, "method=gptq", "bits=4", "group_size=128")).returncode == 0


def test_what_no_configuration_allows_gets_a_nearest_variant_too(root, model):
    done = plan(root, *on(model, "method=awq", "bits=8"))
    assert done.returncode == 2
    assert "bits=8: awq takes 4" in done.stderr
    # Where vLLM serves no 4 bits, another variant is the nearest.
    nearest = "method=" if cpu_instructions() in ("avx2", "none") else "method=awq bits=4 group_size=128"
    assert f"the nearest that works: {nearest}" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_and_criticality_give_a_recommendation_for_a_gpu(root, model):
    arguments = ["model=custom", f"model.path={model}", "gpu_memory_gb=24", "critical=true"]
    done = plan(root, *arguments)
    assert done.returncode == 0
    assert "recommended, what loses least: method=gptq bits=8 group_size=128" in done.stdout
    assert "fits in 24 GiB" in done.stdout
    found = json.loads(plan(root, *arguments, "json=true").stdout)
    assert found["target"]["device"] == "cuda"
    assert found["recommendation"]["best"] == "method=gptq bits=8 group_size=128"
    assert len(found["recommendation"]["choices"]) >= 8


def run_of(composed, root, *overrides):
    return StageRun("quantize", parse(composed(*overrides)), root, overrides)


@pytest.mark.usefixtures("serves_4_bits")  # another variant is the nearest elsewhere
def test_the_quantize_stage_is_told_before_it_computes(root, composed, model):
    own = on(model)
    assert preflight(run_of(composed, root, *own)) == []
    (note,) = preflight(run_of(composed, root, *own, "method=gptq", "bits=8"))
    assert "GPTQ with 4 bits only" in note
    with pytest.raises(RefusedError, match="nearest that works: method=gptq bits=4 group_size=128"):
        preflight(run_of(composed, root, *own, "method=gptq", "bits=8", "convert.for=vllm"))
    with pytest.raises(RefusedError, match="group_size=1024: does not divide"):
        preflight(run_of(composed, root, *own, "method=gptq", "group_size=1024"))


def test_without_a_model_to_read_the_quantize_stage_is_told_nothing(root, composed):
    assert preflight(run_of(composed, root, "model=qwen2_5_3b", "method=gptq")) == []


def test_a_model_that_was_not_downloaded_names_the_command(root):
    done = plan(root, "model=qwen2_5_3b")
    assert done.returncode == 2
    assert "python -m stages.download model=qwen2_5_3b" in done.stderr


def test_options_of_its_own_are_checked_and_kept_from_hydra():
    own, rest = read(
        ["method=gptq", "gpu_memory_gb=24", "critical=true", "serve.dtype=float16"], OPTIONS, configured=True
    )
    options = plan_options(own)
    assert (options.gpu_memory_gb, options.critical, options.as_json) == (24, True, False)
    assert rest == ["method=gptq", "serve.dtype=float16"]
    for wrong in ("gpu_memory_gb=-1", "gpu_memory_gb=much", "critical=maybe", "batch=0", "context=1.5"):
        name, _, value = wrong.partition("=")
        with pytest.raises(ConfigError, match=wrong.replace(".", r"\.")):
            plan_options({name: value})
    assert {option.name for option in OPTIONS} == {
        field.alias or name for name, field in PlanOptions.model_fields.items()
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512dq avx512bw avx512vl", "avx512"),
        ("fpu avx2 avx512f", "avx2"),
        ("fpu sse2", "none"),
    ],
)
def test_the_instruction_set_is_read_from_the_cpus_flags(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu_instructions(tmp_path / "cpuinfo") == expected
    assert cpu_instructions(tmp_path / "missing") is None
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_instructions(tmp_path / "cpuinfo") is None
