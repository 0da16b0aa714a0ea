from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, write_safetensors
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import gptqmodel

pytestmark = pytest.mark.toolchain("gptqmodel")

PARTS = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
SOLVED = ("plain", "gptaq", "foem")
GPTQ = ["plain", "bits_2", "bits_3", "bits_8", "channel", "desc_act", "static", "asymmetric", "one_sided_8"]
GPTQ += ["bfloat16", *SOLVED[1:]]
AWQ = ["awq", "awq_symmetric", "awq_gemv", "awq_one_sided"]


def widths(bits=4, group_size=64, **others):
    """Every linear of the two decoder layers, but for those that `others` replaces or, with None, leaves out."""
    named = {f"model.layers.{i}.{part}": {"bits": bits, "group_size": group_size} for i in (0, 1) for part in PARTS}
    return {name: width for name, width in {**named, **others}.items() if width}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Calibration ids: 16 tokens for 128 columns, and the same token 32 times."""
    folder, generator = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    write_safetensors(folder / "16", {"input_ids": generator.integers(0, 256, (1, 16), dtype=np.int32)})
    write_safetensors(folder / "same", {"input_ids": np.full((2, 16), 7, dtype=np.int32)})
    return folder


@pytest.fixture(scope="module")
def batch(work, job_for, few):
    mixed = {
        "model.layers.0.mlp.down_proj": None, "model.layers.0.self_attn.q_proj": None,
        "model.layers.1.self_attn.q_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.up_proj": {"bits": 4, "group_size": -1}, "lm_head": {"bits": 8, "group_size": 128},
    }  # fmt: skip
    main = {"bits": 4, "group_size": 64}
    skipped = {"model.layers.0.mlp.down_proj": None, "model.layers.0.self_attn.q_proj": None}
    jobs = {
        "plain": job_for("qwen2", "gm"),
        "bits_2": job_for("qwen2", "gm-2", bits=2, group_size=32),
        "bits_3": job_for("qwen2", "gm-3", bits=3),
        "bits_8": job_for("qwen2", "gm-8", bits=8),
        "channel": job_for("qwen2", "gm-channel", group_size=-1),
        "desc_act": job_for("qwen2", "gm-act", options={"desc_act": True}),
        "static": job_for("qwen2", "gm-static", options={"static_groups": True}),
        "gptaq": job_for("qwen2", "gm-gptaq", options={"solver": "gptaq"}),
        "foem": job_for("qwen2", "gm-foem", options={"solver": "foem"}),
        "asymmetric": job_for("one_sided", "gm-asymmetric", options={"sym": False}),
        "one_sided_8": job_for("one_sided", "gm-one-sided-8", bits=8, options={"sym": False}),
        "bfloat16": job_for("qwen2", "gm-bfloat16", bits=8, dtype="bfloat16"),
        "mixed": job_for("llama", "gm-mixed", linears=widths(**mixed)),
        "head_only_after": job_for(
            "llama", "gm-head", linears=widths(lm_head=main, **{f"model.layers.1.{part}": None for part in PARTS})
        ),
        "experts": job_for("mixtral", "gm-experts"),
        "few_experts": job_for("mixtral", "gm-few-experts", calibration=str(few / "same")),
        "damped": job_for("qwen2", "gm-damped", calibration=str(few / "16"), options={"damp_percent": 1e-9}),
        "awq": job_for("qwen2", "gm-awq", method="awq"),
        "awq_unclipped": job_for("qwen2", "gm-awq-unclipped", method="awq", options={"clip": False}),
        "awq_symmetric": job_for("qwen2", "gm-awq-symmetric", method="awq", options={"zero_point": False}),
        "awq_gemv": job_for("qwen2", "gm-awq-gemv", method="awq", options={"version": "gemv"}),
        "awq_one_sided": job_for("one_sided", "gm-awq-one-sided", method="awq"),
        "awq_skipped": job_for("llama", "gm-awq-skipped", method="awq", linears=widths(**skipped)),
        "group_96": job_for("qwen2", "gm-96", group_size=96),
        "overflow": job_for("overflow", "gm-overflow"),
        "unknown": job_for(
            "qwen2", "gm-unknown", linears=widths(**{"model.layers.7.q": {"bits": 4, "group_size": 64}})
        ),
        "other": job_for("qwen2", "gm-other", probe=job_for("llama", "gm-probe")["probe"]),
    }
    results = work("gptqmodel", "batch", {"backend": "gptqmodel", "jobs": jobs})
    return {label: (Path(jobs[label]["output"]), result) for label, result in results.items()}


@pytest.fixture(scope="module")
def facts(work, job_for):
    return work("gptqmodel", "gptqmodel_facts", job_for("qwen2", "gm-facts"))


@pytest.fixture(scope="module")
def interrupted(killed, job_for, tmp_path_factory):
    """method -> a job that was killed with signal 9 when 9 of 14 linears were done."""
    jobs = {}
    for method in ("gptq", "awq"):
        folder = tmp_path_factory.mktemp("interrupted")
        jobs[method] = job_for("qwen2", f"gm-killed-{method}", method=method, work=str(folder))
        killed("gptqmodel", jobs[method], done=9)
    return jobs


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_scaling_by_the_plain_library_corrupts_float32_weights_on_a_cpu(facts):
    assert facts["plain_scaling_moves_logits"] > 0.1
    assert facts["scaling_moves_logits"] < 1e-4


def test_scaling_beside_a_linear_that_stays_float_changes_nothing(facts):
    assert facts["scaling_beside_a_float_linear_moves_logits"] < 1e-4


def test_symmetric_groups_without_negative_weights_are_cut_off_by_the_plain_library_only(facts):
    assert facts["one_sided"]["plain"] > 0.5  # of weights between 0 and 1
    assert facts["one_sided"]["ours"] < 0.07


def test_a_fault_in_one_linear_comes_up_with_its_name(facts):
    assert "model.layers.1.mlp.down_proj: ArithmeticError: made to fail" in facts["failure"]


def test_everything_replaced_in_the_library_is_put_back(facts):
    assert facts["put_back"]
    assert all(facts["put_back"])


@pytest.mark.parametrize("label", [*GPTQ, *AWQ])
def test_what_is_written_is_exactly_what_was_computed(batch, label):
    output, result = batch[label]
    if label != "bfloat16":  # there the model in memory holds each weight rounded once more
        assert result["metrics"]["written_max_difference"] == 0
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 14
    assert result["metrics"]["probe_max_difference"] < 1e-4
    assert quantization_of(output).layout == {"awq_gemv": "awq_gemv"}.get(label, "awq_gemm" if label in AWQ else "gptq")


def test_each_solver_gives_weights_of_its_own_that_beat_fewer_bits(batch):
    weights = [Checkpoint.open(batch[label][0]).tensor("model.layers.1.mlp.down_proj.qweight") for label in SOLVED]
    assert not any(np.array_equal(one, other) for one, other in combinations(weights, 2))
    errors = {label: batch[label][1]["metrics"]["probe_quantized_rms"] for label in (*SOLVED, "bits_3")}
    print(errors)
    assert max(errors[label] for label in SOLVED) < errors["bits_3"]


def test_zero_points_of_zero_are_stored_masked_and_reported(batch):
    for label in ("asymmetric", "one_sided_8"):
        assert "groups have the zero point 0" in batch[label][1]["warnings"][0]
    assert batch["plain"][1]["warnings"] == []


def test_more_bits_come_closer_to_the_float_model(batch):
    error = {label: result["metrics"]["probe_quantized_rms"] for label, (_, result) in batch.items() if label in GPTQ}
    assert error["bits_8"] < error["plain"] < error["bits_3"] < error["bits_2"]
    assert error["bfloat16"] == pytest.approx(error["bits_8"], rel=0.1)


def test_clipping_is_searched_where_asked_for(batch):
    weights = [(batch[label][0] / "model.safetensors").read_bytes() for label in ("awq", "awq_unclipped")]
    assert weights[0] != weights[1]


def test_each_linear_has_the_bits_and_groups_that_were_asked_for(batch):
    output, result = batch["mixed"]
    info, names = quantization_of(output), Checkpoint.open(output).names
    assert (info.of("model.layers.0.mlp.up_proj").bits, info.of("model.layers.0.mlp.up_proj").group_size) == (4, 64)
    assert (info.of("model.layers.1.self_attn.q_proj").bits, info.of("model.layers.1.self_attn.q_proj").group_size) == (
        8,
        32,
    )
    assert info.of("model.layers.1.mlp.up_proj").group_size == -1
    assert (info.of("lm_head").bits, info.of("lm_head").group_size) == (8, 128)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        assert f"{name}.weight" in names
        assert f"{name}.qweight" not in names
    assert "lm_head.qweight" in names
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 13
    assert json.loads((output / "config.json").read_text())["quantization_config"]["lm_head"] is True


def test_the_output_layer_is_quantized_where_the_layers_before_it_are_skipped(batch):
    output, result = batch["head_only_after"]
    assert "lm_head.qweight" in Checkpoint.open(output).names
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 8
    assert result["layers"][-1]["module"] == "lm_head"


def test_linears_that_are_skipped_stay_float_with_awq(batch):
    output, result = batch["awq_skipped"]
    assert "model.layers.0.self_attn.q_proj.weight" in Checkpoint.open(output).names
    assert result["metrics"]["linears_quantized"] == 12
    assert "model.layers.0.mlp.down_proj" in quantization_of(output).modules_to_not_convert


def test_experts_are_quantized_under_the_names_of_the_files(batch, models):
    output, result = batch["experts"]
    names, source = set(Checkpoint.open(output).names), set(Checkpoint.open(models / "mixtral" / "model").names)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.qweight" in names
    assert {name for name in names if name.endswith(".weight")} < source
    assert result["metrics"]["linears_quantized"] == 2 * (4 + 4 * 3)


def test_experts_that_no_token_reached_are_reported(batch):
    reached = batch["few_experts"][1]
    assert any("experts" in text and "0 calibration tokens reached it" in text for text in reached["warnings"])
    assert batch["experts"][1]["warnings"] == []


def test_damping_that_was_raised_is_reported_with_the_layer(batch):
    result = batch["damped"][1]
    assert (
        "model.layers.0.mlp.down_proj: its Hessian could not be inverted with method.damp_percent=1e-09; 0.01 was used"
        in result["warnings"]
    )
    assert all(row["damp_percent"] == pytest.approx(0.01) for row in result["layers"])


def test_every_layer_has_its_loss(batch):
    rows = batch["plain"][1]["layers"]
    assert len(rows) == 14
    assert (rows[0]["layer"], rows[0]["module"]) == (0, "self_attn.q_proj")
    assert all(row["loss"] > 0 and row["seconds"] > 0 and row["tokens"] == 1024 for row in rows)


@pytest.mark.parametrize(("method", "label"), [("gptq", "plain"), ("awq", "awq")])
def test_an_interrupted_job_goes_on_and_gives_the_same_bytes(batch, interrupted, work, method, label):
    job = interrupted[method]
    result = work("gptqmodel", "quantline.toolchains.workers.quantizers.gptqmodel", job)
    assert "resumed an interrupted run" in result["warnings"][0]
    assert written(Path(job["output"])) == written(batch[label][0])
    assert list(Path(job["work"]).iterdir()) == []


def test_both_configs_say_the_same(batch):
    output = batch["desc_act"][0]
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    beside = json.loads((output / "quantize_config.json").read_text())
    assert {key: beside[key] for key in config} == config
    assert (config["desc_act"], config["static_groups"], config["damp_percent"]) == (True, False, 0.05)


def test_the_probe_catches_another_model(batch):
    assert "this toolchain misreads the model" in batch["other"][1]["refused"]


def test_a_group_size_that_does_not_divide_names_every_layer(batch):
    assert batch["group_96"][1]["refused"].count("does not divide its input width") == 14
    assert batch["group_96"][1]["left"] == []


def test_values_beyond_float16_are_refused(batch):
    assert "model.norm.weight has values up to" in batch["overflow"][1]["refused"]


def test_a_linear_that_the_library_does_not_know_is_refused(batch):
    assert "model.layers.7.q" in batch["unknown"][1]["refused"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "rtn"}, "method=rtn: gptqmodel takes gptq or awq"),
        ({"bits": 5}, "bits=5: gptq takes 2, 3, 4, 8"),
        ({"bits": 8, "method": "awq"}, "bits=8: awq takes 4"),
        ({"group_size": 0}, "group_size=0: gptq takes -1 or a divisor"),
        ({"group_size": -1, "method": "awq"}, "group_size=-1: awq takes 32, 64"),
        ({"options": {"damp_percent": 1.5}}, "damp_percent=1.5"),
        ({"options": {"clip": True}}, "options clip: gptq has activation_bits, damp_percent"),
        ({"options": {"activation_bits": 8}}, "activation_bits=8: gptqmodel rounds weights only"),
        ({"options": {"solver": "obq"}}, "solver=obq: gptqmodel takes gptq, gptaq, foem"),
        ({"options": {"static_groups": True}, "group_size": -1}, "static_groups=true with group_size=-1"),
        ({"linears": widths(bits=5)}, "bits=5"),
        ({"linears": widths(lm_head={"bits": 4, "group_size": 64}), "method": "awq"}, "lm_head=quantized: awq"),
        ({"linears": widths(group_size=32), "method": "awq"}, "one group size for all linears"),
        ({"low_memory": True}, "low_memory=true: gptqmodel holds the whole model"),
    ],
)
def test_what_the_library_fails_on_late_is_refused_early(values, message):
    with pytest.raises(JobError, match=message):
        gptqmodel.check({"bits": 4, "group_size": 64, **values})
