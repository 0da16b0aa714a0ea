from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import auto_gptq

pytestmark = pytest.mark.toolchain("auto_gptq")

WRITTEN = ["plain", "bits_2", "bits_3", "bits_8", "channel", "desc_act", "one_sided", "one_sided_8", "static", "llama"]


@pytest.fixture(scope="module")
def few_tokens(models, tmp_path_factory):
    """A calibration of eight tokens: no Hessian of it has full rank."""
    ids = load_file(models / "qwen2" / "tokens.safetensors")["input_ids"]
    path = tmp_path_factory.mktemp("few") / "tokens.safetensors"
    save_file({"input_ids": np.ascontiguousarray(ids[:1, :8])}, path)
    return path


@pytest.fixture(scope="module")
def batch(work, job_for, some_linears, few_tokens):
    jobs = {
        "plain": job_for("qwen2", "gptq"),
        "bits_2": job_for("qwen2", "gptq-2", bits=2, group_size=32),
        "bits_3": job_for("qwen2", "gptq-3", bits=3),
        "bits_8": job_for("qwen2", "gptq-8", bits=8),
        "channel": job_for("qwen2", "gptq-channel", group_size=-1),
        "desc_act": job_for("qwen2", "gptq-act", options={"desc_act": True}),
        "static": job_for("qwen2", "gptq-static", options={"desc_act": True, "static_groups": True}),
        "one_sided": job_for("one_sided", "gptq-one-sided", options={"sym": False}),
        "one_sided_8": job_for("one_sided", "gptq-one-sided-8", bits=8, options={"sym": False}),
        "llama": job_for("llama", "gptq-llama"),
        "untranslated": job_for("qwen2", "gptq-untranslated", untranslated=True),
        "group_96": job_for("qwen2", "gptq-96", group_size=96),
        "overflow": job_for("overflow", "gptq-overflow"),
        "skipped": job_for("qwen2", "gptq-skipped", linears=some_linears),
        "few": job_for("qwen2", "gptq-few", calibration=str(few_tokens), options={"damp_percent": 1e-12}),
    }
    results = work("auto_gptq", "batch", {"backend": "auto_gptq", "jobs": jobs})
    return {label: (Path(jobs[label]["output"]), result) for label, result in results.items()}


@pytest.fixture(scope="module")
def again(work, job_for):
    """The job `plain` once more, in a process of its own."""
    job = job_for("qwen2", "gptq-again")
    return Path(job["output"]), work("auto_gptq", "quantline.toolchains.workers.quantizers.auto_gptq", job)


@pytest.fixture(scope="module")
def facts(work, job_for):
    return work("auto_gptq", "gptq_facts", job_for("one_sided", "gptq-facts"))


def test_linears_that_are_skipped_stay_float_and_the_config_names_them(batch, some_linears):
    folder, result = batch["skipped"]
    names = Checkpoint.open(folder).names
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")} == set(some_linears)
    assert result["metrics"]["linears_quantized"] == len(some_linears)
    patterns = json.loads((folder / "config.json").read_text())["quantization_config"]["dynamic"]
    assert r"-:^model\.layers\.0\.mlp\.up_proj$" in patterns


def test_a_hessian_that_cannot_be_inverted_is_damped_more_strongly_and_that_is_reported(batch):
    warnings = [text for text in batch["few"][1]["warnings"] if "could not be inverted" in text]
    assert warnings
    assert "damp_percent=1e-12; tried again with 1e-11" in warnings[0]
    assert "layer 0 self_attn.k_proj" in warnings[0]


def test_the_plain_library_corrupts_rows_beside_a_group_without_negative_weights(facts):
    errors = facts["asymmetric"]["errors"]
    assert errors["model.layers.0.mlp.up_proj"] > 0.1
    assert max(facts["symmetric"]["errors"].values()) < 0.01


def test_the_plain_library_gives_biases_to_layers_that_have_none(facts):
    assert facts["symmetric"]["bias"]


def test_symmetric_groups_without_negative_weights_are_cut_off_by_the_plain_library_only(facts):
    assert facts["one_sided"]["plain"] > 0.5  # of weights between 0 and 1
    assert facts["one_sided"]["ours"] < 0.07


def test_everything_replaced_in_the_library_and_in_torch_is_put_back(facts):
    assert all(facts["put_back"])


@pytest.mark.parametrize("label", WRITTEN)
def test_what_is_written_is_exactly_what_was_computed(batch, label):
    output, result = batch[label]
    assert result["metrics"]["written_max_difference"] == 0
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 14
    assert result["metrics"]["probe_max_difference"] < 1e-4
    assert quantization_of(output).layout == "gptq"


def test_zero_points_of_zero_are_stored_masked_and_reported(batch):
    for label in ("one_sided", "one_sided_8"):
        assert "groups have the zero point 0" in batch[label][1]["warnings"][0]
    assert batch["plain"][1]["warnings"] == []


def test_more_bits_come_closer_to_the_float_model(batch):
    error = {
        label: result["metrics"].get("probe_quantized_rms") for label, (_, result) in batch.items() if label in WRITTEN
    }
    assert error["bits_8"] < error["plain"] < error["bits_3"] < error["bits_2"]


def test_layers_without_bias_get_none_and_others_keep_theirs(batch):
    names = Checkpoint.open(batch["plain"][0]).names
    biases = {name for name in names if name.endswith(".bias")}
    assert biases == {f"model.layers.{i}.self_attn.{part}_proj.bias" for i in (0, 1) for part in "qkv"}


def test_every_layer_has_its_loss_and_seconds(batch):
    rows = batch["plain"][1]["layers"]
    assert len(rows) == 14
    assert rows[0]["module"] == "self_attn.k_proj"
    assert all(row["loss"] > 0 and row["seconds"] > 0 for row in rows)


def test_the_same_job_gives_the_same_bytes(batch, again):
    first, second = batch["plain"][0], again[0]
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_both_configs_say_the_same(batch, models):
    output = batch["desc_act"][0]
    expected = {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 64, "damp_percent": 0.01,
        "desc_act": True, "sym": True, "true_sequential": True, "static_groups": False,
    }  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    beside = json.loads((output / "quantize_config.json").read_text())
    assert config["quantization_config"] == expected
    assert {key: beside[key] for key in expected} == expected
    assert beside["model_file_base_name"] == "model"


def test_the_probe_catches_a_config_that_the_toolchain_misreads(batch):
    assert "rope_theta is 1000000.0 in config.json and was read as 10000.0" in batch["untranslated"][1]["refused"]


def test_a_group_size_that_does_not_divide_names_every_layer(batch):
    assert batch["group_96"][1]["refused"].count("does not divide its input width") == 14
    assert batch["group_96"][1]["left"] == []


def test_values_beyond_float16_are_refused(batch):
    assert "model.norm.weight has values up to" in batch["overflow"][1]["refused"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits=5: gptq takes 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0: gptq takes -1 or a divisor"),
        ({"options": {"damp_percent": 1.5}}, "damp_percent=1.5"),
        ({"options": {"clip": True}}, "options clip: gptq has damp_percent, desc_act"),
    ],
)
def test_what_the_library_fails_on_late_is_refused_early(values, message):
    with pytest.raises(JobError, match=message):
        auto_gptq.check({"bits": 4, "group_size": 64, **values})
