from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import pytest
from tiny_quantized import write_whole
from variant_records import record

from quantline.lifecycle.variant_doctor import ACCURACY, LOADING, SPEED, as_lines, bundle, examine_variant
from quantline.pipeline.identity import file_hashes


@pytest.fixture
def made(composed, tmp_path, root):
    """Examine a sound variant, with changes of the results of its stages and of its files."""
    folder = write_whole(tmp_path / "gptq-w4" / "convert", "gptq")

    def do(spoil=None, without=(), overrides=(), **changes):
        own = record("gptq-w4", "gptq", 4, 0.01, tmp_path / "work")
        results = [dict(result) for result in own.results if result["stage"] not in without]
        for result in results:
            if result["stage"] == "convert":
                result["outputs"] = file_hashes(folder)
            result.update(changes.get(result["stage"], {}))
        if spoil:
            spoil(folder)
        config = composed("method=gptq", "bits=4", "tracking.uri=null", "serve.process.kv_cache_gib=0.01", *overrides)
        made = replace(own, config=config, results=results, outputs={"convert": folder})
        return made, examine_variant(root, made)

    return do


def causes(report, trouble):
    return {cause.cause: cause for cause in report.causes if cause.trouble == trouble}


def flags(**messages):
    return {"tables": {"flags": [{"instrument": key, "message": value} for key, value in messages.items()]}}


def test_a_sound_variant_has_no_cause_for_any_trouble(made, serves_4_bits):
    report = made()[1]
    assert report.causes == ()
    assert [line for line in as_lines(report) if line.endswith("nothing found")] == [
        "does not load: nothing found", "lost accuracy: nothing found", "slow: nothing found"
    ]  # fmt: skip


def test_a_changed_file_is_told_with_the_command_that_brings_it_back(made):
    def spoil(folder):
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")

    found = causes(made(spoil)[1], LOADING)["its files are not those that were made"]
    assert "config.json" in found.fact
    assert found.remedy.startswith("run: ")


def test_what_the_server_refuses_and_what_does_not_fit_is_told(made):
    refused = made(serve_smoke={"status": "unsupported", "reason": "no kernel for 3 bits"})[1]
    assert causes(refused, LOADING)["vLLM does not serve it"].fact == "no kernel for 3 bits"
    large = made(overrides=["serve.process.kv_cache_gib=100000"])[1]
    assert causes(large, LOADING)["the memory is too small"].fact.startswith("it needs 10000")
    assert "it was never served" in causes(made(without=["serve_smoke"])[1], LOADING)


def test_a_class_that_is_served_in_bfloat16_is_not_said_to_be_refused_in_float16(made, serves_4_bits):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma2ForCausalLM"]}))

    assert "this server does not serve it on this machine" not in causes(made(spoil)[1], LOADING)


def test_alarms_are_read_together_as_one_cause(made):
    rows = [
        {"name": "model.layers.0.mlp.down_proj", "recovered_kl_share": 0.3},
        {"name": "x", "recovered_kl_share": 0.1},
    ]
    one = flags(output_error_outlier="3.3 times the median", kl_divergence="0.2 nats")
    one["tables"]["restored"] = rows
    found = causes(made(evaluate=one)[1], ACCURACY)
    assert "one linear is damaged or badly quantized: model.layers.0.mlp.down_proj" in found
    assert "the answers differ more than allowed" in found
    bits = causes(made(evaluate=flags(kl_divergence="0.2 nats"))[1], ACCURACY)
    assert list(bits) == ["too few bits for this model, everywhere"]
    text = causes(made(evaluate=flags(rounding_ratio="1.2 times as far", kl_divergence="0.2 nats"))[1], ACCURACY)
    assert list(text) == ["the calibration text does not suit the model", "the answers differ more than allowed"]
    other = causes(made(evaluate=flags(weight_error_change="225 %"))[1], ACCURACY)
    assert list(other) == ["the weights are not those that were quantized"]


def test_a_slow_variant_has_the_reason_that_its_results_name(made):
    slow = {"metrics": {"speed_up_c1": 0.8, "speed_up_c8": 1.1}}
    found = causes(made(speed=slow)[1], SPEED)
    assert found["4-bit kernels do not pay off here"].fact == "speed_up_c1 is 0.80 of float's"
    busy = {**slow, "monitor": {"before": {"system_memory_total_bytes": 100, "system_memory_used_bytes": 93}}}
    assert list(causes(made(speed=busy)[1], SPEED)) == ["something else used the machine"]
    offloaded = made(overrides=["serve.process.cpu_offload_gib=2"])[1]
    assert "weights in main memory" in causes(offloaded, SPEED)


def test_the_bundle_has_results_and_findings_and_no_secret(made, tmp_path, root, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    own, report = made(quantize={"reason": "asked with hf_abcdefgh and https://user:pass@host/x"})
    path = bundle(root, own, report, tmp_path / "out" / "bug.zip")
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        text = "".join(file.read(name).decode() for name in names)
        assert json.loads(file.read("report.json"))["variant"] == "gptq-w4"
    assert "results/evaluate.json" in names
    assert "hf_abcdefgh" not in text
    assert "pass@host" not in text
    assert not [name for name in names if name.endswith(".safetensors")]
