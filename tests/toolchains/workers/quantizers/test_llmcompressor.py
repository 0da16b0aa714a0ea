from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers, write_safetensors
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import llmcompressor

pytestmark = pytest.mark.toolchain("llmcompressor")

PARTS = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
GPTQ = ["plain", "bits_2", "bits_3", "bits_8", "channel", "static", "asymmetric", "asymmetric_8", "by_layer", "w8a8"]
RTN = ["rtn", "rtn_asymmetric", "rtn_w8a8"]
AWQ = ["awq", "awq_symmetric", "awq_8"]
METHODS = {"plain": "gptq", "awq": "awq"}
# Weights of floating-point codes: method, scheme, bits, group size
FLOATS = {
    "fp8_dynamic": ("fp8", "dynamic", 8, -1), "fp8_static": ("fp8", "static", 8, -1), "fp8_block": ("fp8", "block", 8, 128),
    "nvfp4": ("fp4", "nvfp4", 4, 16), "mxfp4a16": ("fp4", "mxfp4a16", 4, 32), "mxfp8": ("mxfp8", "mxfp8", 8, 32),
}  # fmt: skip
MODULE = "quantline.toolchains.workers.quantizers.llmcompressor"
W8A8 = {"bits": 8, "group_size": -1, "options": {"activation_bits": 8}}


def widths(**others):
    """Every linear of the two decoder layers, but for those that `others` replaces or, with None, leaves out."""
    named = {f"model.layers.{i}.{part}": {"bits": 4, "group_size": 64} for i in (0, 1) for part in PARTS}
    return {name: width for name, width in {**named, **others}.items() if width}


SKIPPED = {"model.layers.1.self_attn.o_proj": None, "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1}}


@pytest.fixture(scope="module")
def batch(work, job_for, tmp_path_factory):
    few = tmp_path_factory.mktemp("few") / "tokens"
    write_safetensors(few, {"input_ids": np.arange(4, dtype=np.int32)[None]})
    mixed = widths(**SKIPPED, lm_head={"bits": 8, "group_size": 32})
    uneven = widths(**{"model.layers.1.mlp.up_proj": {"bits": 8, "group_size": 64}})
    jobs = {
        "plain": job_for("qwen2", "lc"),
        "bits_2": job_for("qwen2", "lc-2", bits=2, group_size=32),
        "bits_3": job_for("qwen2", "lc-3", bits=3),
        "bits_8": job_for("qwen2", "lc-8", bits=8),
        "channel": job_for("qwen2", "lc-channel", group_size=-1),
        "static": job_for("qwen2", "lc-static", options={"desc_act": True, "static_groups": True}),
        "asymmetric": job_for("one_sided", "lc-asymmetric", options={"sym": False}),
        "asymmetric_8": job_for("one_sided", "lc-asymmetric-8", bits=8, options={"sym": False}),
        "by_layer": job_for("qwen2", "lc-by-layer", options={"true_sequential": False}),
        "w8a8": job_for("qwen2", "lc-w8a8", **W8A8),
        "rtn": job_for("qwen2", "lc-rtn", method="rtn", calibration=None),
        "rtn_asymmetric": job_for("one_sided", "lc-rtn-a", method="rtn", options={"sym": False}),
        "rtn_w8a8": job_for("qwen2", "lc-rtn-w8a8", method="rtn", **W8A8),
        "awq": job_for("qwen2", "lc-awq", method="awq"),
        "awq_symmetric": job_for("qwen2", "lc-awq-s", method="awq", options={"zero_point": False}),
        "awq_8": job_for("qwen2", "lc-awq-8", method="awq", bits=8),
        "mixed": job_for("llama", "lc-mixed", linears=mixed),
        "mixed_awq": job_for("llama", "lc-mixed-awq", method="awq", linears=widths(**SKIPPED)),
        "uneven_awq": job_for("llama", "lc-uneven-awq", method="awq", linears=uneven),
        "bfloat16": job_for("qwen2", "lc-bfloat16", bits=8, dtype="bfloat16", options={"sym": False}),
        "experts": job_for("mixtral", "lc-experts"),
        "experts_rtn": job_for("mixtral", "lc-experts-rtn", method="rtn"),
        "damped": job_for("qwen2", "lc-damped", calibration=str(few), options={"damp_percent": 1e-12}),
        "w4a8": job_for("qwen2", "lc-w4a8", method="rtn", options={"activation_bits": 8}),
        "w4afp8": job_for("qwen2", "lc-w4afp8", method="rtn", options={"activation_bits": "fp8"}),
        **{
            label: job_for(
                "qwen2", f"lc-{label}", method=method, bits=bits, group_size=size, options={"scheme": scheme}
            )
            for label, (method, scheme, bits, size) in FLOATS.items()
        },
        "unknown": job_for("qwen2", "lc-unknown", linears={"model.layers.7.x": {"bits": 4, "group_size": 64}}),
        "group_96": job_for("qwen2", "lc-96", group_size=96),
        "overflow": job_for("overflow", "lc-overflow"),
        "misread": job_for("qwen2", "lc-misread", probe_tolerance=-1.0),
    }
    results = work("llmcompressor", "batch", {"backend": "llmcompressor", "jobs": jobs})
    return {label: (Path(jobs[label]["output"]), result) for label, result in results.items()}


@pytest.fixture(scope="module")
def again(work, job_for):
    """Two of the jobs once more, in processes of their own."""
    jobs = {label: job_for("qwen2", f"lc-{label}-again", method=method) for label, method in METHODS.items()}
    for job in jobs.values():
        work("llmcompressor", "quantline.toolchains.workers.quantizers.llmcompressor", job)
    return {label: Path(job["output"]) for label, job in jobs.items()}


@pytest.fixture(scope="module")
def facts(work, job_for):
    return work("llmcompressor", "llmcompressor_facts", job_for("mixtral", "lc-facts"))


def error(batch, label):
    return batch[label][1]["metrics"]["probe_quantized_rms"]


def test_the_plain_library_calibrates_mixtral_on_attention_to_later_tokens_and_the_worker_does_not(facts):
    assert facts["plain"] > 0.1
    assert facts["mended"] < 1e-5


def test_everything_replaced_in_the_library_is_put_back(facts):
    assert all(facts["put_back"])


@pytest.mark.parametrize("label", [*GPTQ, *RTN, *AWQ])
def test_what_is_written_is_exactly_what_was_computed(batch, label):
    output, result = batch[label]
    assert result["metrics"]["written_max_difference"] == 0
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 14
    assert result["metrics"]["probe_max_difference"] < 1e-4
    assert result["warnings"] == []
    info = quantization_of(output)
    assert info.layout == ("compressed_tensors_int" if "w8a8" in label else "compressed_tensors")
    assert info.symmetric != (label == "awq" or "asymmetric" in label or label == "awq_8")


def test_more_bits_come_closer_to_the_float_model_and_both_methods_beat_plain_rounding(batch):
    assert error(batch, "bits_8") < error(batch, "plain") < error(batch, "bits_3") < error(batch, "bits_2")
    assert error(batch, "awq_symmetric") < error(batch, "rtn")
    assert error(batch, "plain") < error(batch, "rtn")
    assert error(batch, "w8a8") < error(batch, "rtn_w8a8")


def test_what_goes_into_linears_is_rounded_where_the_config_says_so(batch):
    for label in ("w8a8", "rtn_w8a8"):
        output = batch[label][0]
        assert quantization_of(output).activation_bits == 8
        section = json.loads((output / "config.json").read_text())["quantization_config"]
        assert section["format"] == "int-quantized"
        assert section["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
        weight = Checkpoint.open(output).info("model.layers.0.mlp.up_proj.weight")
        assert (weight.dtype, weight.shape) == ("I8", (256, 128))
    assert quantization_of(batch["plain"][0]).activation_bits is None


@pytest.mark.parametrize("label", [*FLOATS, "w4a8", "w4afp8"])
def test_floating_point_codes_and_integers_beside_rounded_inputs_are_written_as_computed(batch, label):
    output, result = batch[label]
    assert result["metrics"]["written_max_difference"] == 0
    assert result["metrics"]["linears_quantized"] == result["metrics"]["linears_expected"] == 14
    assert all(0 < row["relative_error"] < 0.2 for row in result["layers"])
    info = quantization_of(output)
    assert (info.activation_bits is None) == ("a16" in label)
    assert 0 < error(batch, label) < (0.5 if info.bits == 8 else 1.2)
    tensors = quantized_layers(Checkpoint.open(output), info)["model.layers.0.mlp.up_proj"]
    assert (info.activations is not None and info.activations.tensor in tensors) == (label in ("fp8_static", "nvfp4"))


def test_fp8_is_closer_than_fp4_and_blocks_are_closer_than_one_scale(batch):
    assert error(batch, "fp8_block") < error(batch, "nvfp4")
    assert error(batch, "fp8_dynamic") < error(batch, "mxfp4a16")


def test_linears_get_their_own_widths_and_those_not_asked_for_stay_float(batch):
    for label, head in (("mixed", True), ("mixed_awq", False)):
        output, result = batch[label]
        info = quantization_of(output)
        found = set(quantized_layers(Checkpoint.open(output), info))
        assert found == set(widths(**SKIPPED)) | ({"lm_head"} if head else set())
        assert (info.of("model.layers.0.mlp.down_proj").bits, info.of("model.layers.0.mlp.up_proj").bits) == (8, 4)
        assert info.of("model.layers.0.mlp.down_proj").group_size == -1
        assert "model.layers.1.self_attn.o_proj" in info.modules_to_not_convert
        assert ("lm_head" in info.modules_to_not_convert) != head
        assert result["metrics"]["written_max_difference"] == 0


def test_experts_are_quantized_one_by_one_under_the_names_of_the_files(batch):
    for label in ("experts", "experts_rtn"):
        output, result = batch[label]
        found = quantized_layers(Checkpoint.open(output), quantization_of(output))
        assert len(found) == result["metrics"]["linears_quantized"] == 2 * (4 + 4 * 3)
        assert "model.layers.0.block_sparse_moe.experts.3.w1" in found
        assert "model.layers.0.block_sparse_moe.gate" in quantization_of(output).modules_to_not_convert
    assert error(batch, "experts") < error(batch, "experts_rtn")


def test_a_hessian_that_cannot_be_inverted_gets_more_damping_and_a_warning(batch):
    _, result = batch["damped"]
    assert "its Hessian could not be inverted with method.damp_percent=1e-12; " in result["warnings"][0]
    assert all(1e-12 <= row["damp_percent"] <= 1e-4 for row in result["layers"])
    assert max(row["damp_percent"] for row in result["layers"]) > 1e-12


def test_bfloat16_models_are_rounded_in_float32(batch):
    assert batch["bfloat16"][1]["metrics"]["linears_quantized"] == 14
    assert error(batch, "bfloat16") < error(batch, "plain")


def test_every_linear_has_its_row_and_awq_has_one_for_every_scaled_layer(batch):
    rows = batch["plain"][1]["layers"]
    assert [row["module"] for row in rows] == PARTS * 2
    assert all(row["loss"] > 0 and row["seconds"] > 0 for row in rows)
    assert all(0 < row["relative_error"] < 0.5 for row in batch["rtn"][1]["layers"])
    scaled = batch["awq"][1]["layers"]
    assert {row["module"] for row in scaled} == {
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.v_proj",
        "mlp.up_proj",
    }
    assert all(row["best_error"] <= row["initial_error"] for row in scaled)


def test_the_same_job_gives_the_same_bytes(batch, again):
    for label, second in again.items():
        first = batch[label][0]
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("unknown", "model.layers.7.x and 0 other linears of this model"),
        ("group_96", "group_size=96 does not divide its input width 128"),
        ("overflow", "model.norm.weight has values up to"),
        ("misread", "this toolchain misreads the model"),
        ("uneven_awq", "awq scales these together, so they need the same bits and group_size"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(batch, label, message):
    assert message in batch[label][1]["refused"]
    assert batch[label][1]["left"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits=5: gptq takes 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0: gptq takes -1 or a divisor"),
        ({"options": {"damp_percent": 1.5}}, "damp_percent=1.5"),
        ({"options": {"desc_act": True}}, "give method.static_groups=true"),
        (
            {"bits": 8, "options": {"activation_bits": 8}},
            "activation_bits=8 with bits=8 group_size=64 method.sym=true: kernels take",
        ),
        ({**W8A8, "options": {"activation_bits": 8, "sym": False}}, "sym=false: kernels take bits=8"),
        ({"method": "awq", "options": {"clip": True}}, "give method.clip=false"),
        (
            {"method": "awq", "options": {"version": "gemv"}},
            "version=gemv: llmcompressor always writes compressed",
        ),
        ({"method": "bnb"}, "method=bnb: llmcompressor takes gptq, rtn, awq"),
    ],
)
def test_what_the_library_cannot_do_is_refused_early(values, message):
    with pytest.raises(JobError, match=message):
        llmcompressor.check({"bits": 4, "group_size": 64, **values})


@pytest.fixture(scope="module")
def by_two(work, job_for):
    """One job by one and by two processes: the result and the output's folder of each."""
    found = []
    for gpus in (1, 2):
        job = job_for("mixtral", f"lc-by-{gpus}", gpus=gpus, method="gptq")
        found.append((work("llmcompressor", MODULE, job), Checkpoint.open(Path(job["output"]))))
    return found


def test_two_processes_quantize_every_linear_as_well_as_one(by_two):
    (one, first), (two, second) = by_two
    places = [sorted((row["layer"], row["module"]) for row in found["layers"]) for found in (one, two)]
    assert places[0] == places[1]
    assert len(two["layers"]) == two["metrics"]["linears_quantized"]
    # Only the order of the sums of the Hessians differs.
    assert two["metrics"]["probe_quantized_rms"] == pytest.approx(one["metrics"]["probe_quantized_rms"], rel=0.02)
    assert sorted(first.names) == sorted(second.names)
    assert sorted(path.name for path in first.folder.iterdir()) == sorted(path.name for path in second.folder.iterdir())


def test_the_first_linears_are_the_same_as_by_one_process_so_that_no_sample_was_lost(by_two):
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight_packed"
        one, two = (checkpoint.tensor(name) for _, checkpoint in by_two)
        assert np.mean(one != two) < 0.01


def test_another_method_on_several_gpus_is_refused(work, job_for):
    with pytest.raises(UserError, match=r"quantize\.gpus=2: awq by llmcompressor takes 1; give 1, or method=gptq"):
        work("llmcompressor", MODULE, job_for("qwen2", "lc-awq-by-2", gpus=2, method="awq"))
