from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.checkpoints.float_view import iter_dequantized
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import bitsandbytes

pytestmark = pytest.mark.toolchain("bitsandbytes")

WRITTEN = ["nf4", "plain_nf4", "fp4", "large_blocks", "int8", "skipped", "lm_head", "lm_head_8", "bfloat16"]
PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PARTS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LINEARS = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in PARTS]
SKIPPED = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def batch(work, job_for):
    def all_of(bits, *names, size=64):
        return {name: {"bits": bits, "group_size": size} for name in names}

    mixed = {**all_of(4, *LINEARS), LINEARS[3]: {"bits": 8, "group_size": 64}}
    jobs = {
        "nf4": job_for("qwen2", "bnb-nf4"),
        "plain_nf4": job_for("qwen2", "bnb-plain", options={"double_quant": False}),
        "fp4": job_for("qwen2", "bnb-fp4", group_size=128, options={"quant_type": "fp4"}),
        "large_blocks": job_for("qwen2", "bnb-2048", group_size=2048),
        "int8": job_for("qwen2", "bnb-8", bits=8, group_size=128),
        "skipped": job_for("qwen2", "bnb-skipped", linears=all_of(4, *(set(LINEARS) - {SKIPPED}))),
        "lm_head": job_for("llama", "bnb-head", linears=all_of(4, *LINEARS, "lm_head")),
        "lm_head_8": job_for("llama", "bnb-head-8", bits=8, linears=all_of(8, *LINEARS, "lm_head")),
        "bfloat16": job_for("llama", "bnb-bf16", dtype="bfloat16", probe_tolerance=0.05),
        "mixed": job_for("qwen2", "bnb-mixed", linears=mixed),
        "unknown": job_for("qwen2", "bnb-unknown", linears=all_of(4, "model.embed_tokens")),
        "overflow": job_for("overflow", "bnb-overflow"),
    }  # fmt: skip
    results = work("bitsandbytes", "batch", {"backend": "bitsandbytes", "jobs": jobs})
    return {label: (Path(jobs[label]["output"]), result) for label, result in results.items()}


@pytest.fixture(scope="module")
def again(work, job_for):
    """The job `nf4` once more, in a process of its own."""
    job = job_for("qwen2", "bnb-again")
    return Path(job["output"]), work("bitsandbytes", "quantline.toolchains.workers.quantizers.bitsandbytes", job)


@pytest.fixture(scope="module")
def facts(work, batch):
    return work("bitsandbytes", "bnb_facts", {"folders": {label: str(batch[label][0]) for label in WRITTEN}})


@pytest.mark.parametrize("label", WRITTEN)
def test_what_is_written_is_what_the_library_reads_to_the_bit(batch, label):
    output, result = batch[label]
    metrics, count = result["metrics"], {"skipped": 13, "lm_head": 15, "lm_head_8": 15}.get(label, 14)
    assert metrics["written_max_difference"] == 0
    assert metrics["linears_quantized"] == metrics["linears_expected"] == len(result["layers"]) == count
    assert len(quantized_layers(Checkpoint.open(output), quantization_of(output))) == count
    assert result["warnings"] == []


def test_our_weights_are_the_librarys_for_every_type_block_size_and_dtype(facts):
    assert len(facts["blocks"]) == 97
    assert set(facts["blocks"].values()) == {0.0}


@pytest.mark.parametrize("label", WRITTEN)
def test_transformers_loads_what_was_written_with_the_same_weights(facts, label):
    kind = "Linear8bitLt" if label in ("int8", "lm_head_8") else "Linear4bit"
    kinds = facts["loaded"][label]["kinds"]
    floats = set() if label.startswith("lm_head") else {"lm_head"}
    floats |= {SKIPPED} if label == "skipped" else set()
    assert {name for name, value in kinds.items() if value == "Linear"} == floats
    assert {value for name, value in kinds.items() if name not in floats} == {kind}
    assert facts["loaded"][label]["difference"] == 0


def test_eight_bits_come_closer_than_nf4_and_nf4_closer_than_fp4(batch):
    errors = [batch[label][1]["metrics"]["probe_quantized_rms"] for label in ("int8", "nf4", "fp4")]
    assert errors == sorted(errors)


def test_the_config_names_type_blocks_and_float_linears(batch):
    info = quantization_of(batch["fp4"][0])
    assert (info.method, info.bits, info.group_size) == ("bitsandbytes", 4, 128)
    config = json.loads((batch["fp4"][0] / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("fp4", True)
    assert quantization_of(batch["int8"][0]).group_size == -1
    assert set(quantization_of(batch["skipped"][0]).modules_to_not_convert) == {SKIPPED, "lm_head"}
    assert quantization_of(batch["lm_head"][0]).modules_to_not_convert == ()


def test_tensors_have_the_names_that_transformers_gives_them(batch):
    names = [name for name in Checkpoint.open(batch["nf4"][0]).names if "layers.0.mlp.up_proj" in name]
    parts = ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", ".quant_state.bitsandbytes__nf4"]
    assert names == [f"model.layers.0.mlp.up_proj.weight{part}" for part in parts]
    names = [name for name in Checkpoint.open(batch["int8"][0]).names if "layers.0.mlp.up_proj" in name]
    assert names == [f"model.layers.0.mlp.up_proj.{part}" for part in ("SCB", "weight", "weight_format")]


def test_biases_and_skipped_weights_stay_in_float16(batch, models):
    source = dict(iter_dequantized(models / "qwen2" / "model"))
    written = dict(iter_dequantized(batch["skipped"][0]))
    for name in (f"{SKIPPED}.weight", "model.layers.0.self_attn.q_proj.bias"):
        np.testing.assert_array_equal(written[name], source[name].astype(np.float16).astype(np.float32))


def test_the_same_job_gives_the_same_bytes(batch, again):
    first, second = batch["nf4"][0], again[0]
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize(("label", "bits", "size"), [("nf4", 4, 64), ("int8", 8, -1)])
def test_convert_keeps_it_as_it_is(batch, tmp_path, label, bits, size):
    proof = convert(batch[label][0], tmp_path, ConvertConfig(target="auto"))
    assert {(linear.bits, linear.group_size) for linear in proof.linears} == {(bits, size)}
    assert len(proof.linears) == 14
    down = next(linear for linear in proof.linears if linear.name.endswith("down_proj"))
    assert (down.in_features, down.out_features) == (256, 128)
    assert (tmp_path / "model.safetensors").read_bytes() == (batch[label][0] / "model.safetensors").read_bytes()


def test_convert_refuses_other_layouts_by_name(batch, tmp_path):
    with pytest.raises(UserError, match=r"convert\.target=gptq: bitsandbytes's weights have no codes on a grid"):
        convert(batch["nf4"][0], tmp_path, ConvertConfig(target="gptq"))
    assert list(tmp_path.iterdir()) == []


def test_widths_of_single_layers_and_unknown_linears_are_refused(batch):
    assert f"{LINEARS[3]}: bnb uses the same bits and block size" in batch["mixed"][1]["refused"]
    assert "model.embed_tokens and 0 other linears of this model" in batch["unknown"][1]["refused"]


def test_values_beyond_float16_are_refused(batch):
    assert "model.norm.weight has values up to" in batch["overflow"][1]["refused"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits=3: bnb takes 4 or 8"),
        ({"group_size": 32}, "group_size=32: bnb takes blocks of 64, 128"),
        ({"group_size": -1}, "group_size=-1: bnb takes blocks of 64, 128"),
        ({"options": {"quant_type": "int4"}}, "quant_type=int4: bnb takes nf4 or fp4"),
        ({"options": {"sym": True}}, "options sym: bnb has double_quant, quant_type"),
    ],
)
def test_what_the_library_fails_on_late_is_refused_early(values, message):
    with pytest.raises(JobError, match=message):
        bitsandbytes.check({"bits": 4, "group_size": 64, **values})
