from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.pipeline.hashing import hash_folder
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import autoawq

pytestmark = pytest.mark.toolchain("autoawq")


@pytest.fixture(scope="module")
def batch(work, job_for, some_linears, models, tmp_path_factory):
    other = tmp_path_factory.mktemp("headers") / "model"
    shutil.copytree(models / "qwen2" / "model", other)
    tensors = {name: np.array(Checkpoint.open(other).tensor(name)) for name in Checkpoint.open(other).names}
    write_safetensors(other / "model.safetensors", tensors, {"format": "of another tool"})
    jobs = {
        "header": {**job_for("qwen2", "awq-header"), "model": str(other)},
        "gemm": job_for("qwen2", "awq-gemm"),
        "gemv": job_for("qwen2", "awq-gemv", options={"version": "gemv"}),
        "one_sided": job_for("one_sided", "awq-one-sided", options={"clip": False}),
        "symmetric": job_for("qwen2", "awq-symmetric", options={"zero_point": False}),
        "llama": job_for("llama", "awq-llama", group_size=32),
        "untranslated": job_for("qwen2", "awq-untranslated", untranslated=True),
        "untranslated_llama": job_for("llama", "awq-untranslated-llama", untranslated=True),
        "group_96": job_for("qwen2", "awq-96", group_size=96),
        "overflow": job_for("overflow", "awq-overflow"),
        "skipped": job_for("qwen2", "awq-skipped", linears=some_linears),
        "exllama": job_for("qwen2", "awq-exllama", options={"version": "exllama"}),
    }
    results = work("autoawq", "batch", {"backend": "autoawq", "jobs": jobs})
    return {label: (Path(jobs[label]["output"]), result) for label, result in results.items()}


@pytest.fixture(scope="module")
def again(work, job_for):
    """The job `gemm` once more, in a process of its own."""
    job = job_for("qwen2", "awq-again")
    return Path(job["output"]), work("autoawq", "quantline.toolchains.workers.quantizers.autoawq", job)


@pytest.fixture(scope="module")
def facts(work, job_for, batch):
    rounded = job_for("qwen2", "awq-rtn", options={"sym": False})
    work("autoawq", "quantline.toolchains.workers.quantizers.native", rounded)
    written = str(batch["gemm"][0])
    return work("autoawq", "awq_facts", job_for("qwen2", "awq-facts", written=written, rounded=rounded["output"]))


def test_a_model_whose_header_is_of_another_tool_is_quantized_as_any(batch):
    gemm, header = (hash_folder(batch[label][0]) for label in ("gemm", "header"))
    assert header.tensors == gemm.tensors


def test_linears_that_are_skipped_stay_float_and_the_config_names_them(batch, some_linears):
    folder, result = batch["skipped"]
    names = Checkpoint.open(folder).names
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")} == set(some_linears)
    assert result["metrics"]["linears_quantized"] == len(some_linears)
    assert "model.layers.0.mlp.up_proj" in quantization_of(folder).modules_to_not_convert


def test_exllama_is_stored_as_gemm_and_named_in_the_config(batch):
    gemm, exllama = (batch[label][0] for label in ("gemm", "exllama"))
    assert (gemm / "model.safetensors").read_bytes() == (exllama / "model.safetensors").read_bytes()
    assert json.loads((exllama / "config.json").read_text())["quantization_config"]["version"] == "exllama"


def test_scaling_by_the_plain_library_changes_the_float_model_on_a_cpu(facts):
    assert facts["plain_scaling_moves_logits"] > 1


def test_scaling_in_the_worker_leaves_the_float_model_as_it_is(facts):
    assert facts["mended_scaling_moves_logits"] < 0.01


def test_groups_of_one_sign_are_cut_off_by_the_plain_library_only(facts):
    assert facts["one_sided"]["plain"] > 0.1  # of weights between 0.2 and 0.3
    assert facts["one_sided"]["ours"] <= 0.3 / 15 / 2 + 1e-4


def test_clipping_ranges_are_those_of_the_library(facts):
    assert facts["clipping_agreement"] > 0.99


def test_the_librarys_own_reader_gives_the_logits_that_the_worker_measured(facts, batch):
    measured = batch["gemm"][1]["metrics"]["probe_quantized_rms"]
    assert facts["read_back_rms"] == pytest.approx(measured, rel=0.05)


def test_the_result_is_nearer_to_the_float_model_than_the_plain_librarys_and_plain_rounding(facts, batch):
    ours = batch["gemm"][1]["metrics"]["probe_quantized_rms"]
    assert ours < facts["rounded_rms"] < facts["plain_rms"]


@pytest.mark.parametrize("label", ["gemm", "gemv", "one_sided", "symmetric", "llama"])
def test_what_is_written_is_exactly_what_was_computed(batch, label):
    output, result = batch[label]
    assert result["metrics"]["written_max_difference"] == 0
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 14
    assert result["metrics"]["probe_max_difference"] < 1e-4
    assert result["metrics"]["calibration_tokens"] == 16 * 64
    assert quantization_of(output).layout == ("awq_gemv" if label == "gemv" else "awq_gemm")


def test_gemv_holds_the_same_weights_as_gemm(batch):
    gemm, gemv = (dict(iter_dequantized(batch[label][0])) for label in ("gemm", "gemv"))
    assert all(np.array_equal(gemm[name], gemv[name]) for name in gemm)


def test_without_zero_points_every_zero_point_is_the_middle_one(batch):
    checkpoint = Checkpoint.open(batch["symmetric"][0])
    zeros = [checkpoint.tensor(name) for name in checkpoint.names if name.endswith("qzeros")]
    assert len(zeros) == 14
    assert all((words.view(np.uint32) == 0x88888888).all() for words in zeros)


def test_the_same_job_gives_the_same_bytes(batch, again):
    first, second = batch["gemm"][0], again[0]
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_result_is_a_whole_model_folder(batch, models):
    output, source = batch["gemm"][0], models / "qwen2" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    own, result = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert result.pop("quantization_config") == {
        "quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": None,
    }  # fmt: skip
    assert result == {**own, "dtype": "float16"}
    assert result["rope_parameters"]["rope_theta"] == 1e6


def test_tied_embeddings_stay_tied_and_untied_ones_untied(batch):
    assert "lm_head.weight" not in Checkpoint.open(batch["gemm"][0]).names
    assert "lm_head.weight" in Checkpoint.open(batch["llama"][0]).names


def test_floats_of_a_result_are_float16(batch):
    checkpoint = Checkpoint.open(batch["gemm"][0])
    assert {checkpoint.info(name).dtype for name in checkpoint.names} == {"F16", "I32"}


@pytest.mark.parametrize("label", ["untranslated", "untranslated_llama"])
def test_the_probe_catches_a_config_that_the_toolchain_misreads(batch, label):
    refused = batch[label][1]["refused"]
    assert "this toolchain misreads the model" in refused
    theta = {"untranslated": 1000000.0, "untranslated_llama": 500000.0}[label]
    assert f"rope_theta is {theta} in config.json and was read as 10000.0" in refused
    assert batch[label][1]["left"] == []


def test_a_group_size_that_does_not_divide_names_every_layer(batch):
    refused = batch["group_96"][1]["refused"]
    assert refused.count("does not divide its input width") == 14
    assert "model.layers.1.mlp.down_proj: group_size=96 does not divide its input width 256" in refused


def test_values_beyond_float16_are_refused(batch):
    assert "model.norm.weight has values up to 9.984e+04" in batch["overflow"][1]["refused"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 8}, "bits=8: awq takes 4; use method=gptq"),
        ({"group_size": -1}, "group_size=-1: awq takes 32, 64 or 128"),
        ({"options": {"version": "marlin"}}, "version=marlin: awq takes gemm, gemv"),
        ({"options": {"damp": 1}}, "options damp: awq has clip, version, zero_point"),
    ],
)
def test_what_the_library_fails_on_late_is_refused_early(values, message):
    with pytest.raises(JobError, match=message):
        autoawq.check({"bits": 4, "group_size": 64, **values})
