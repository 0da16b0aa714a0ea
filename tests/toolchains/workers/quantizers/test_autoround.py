from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import autoround

pytestmark = pytest.mark.toolchain("autoround")

WRITTEN = [
    "plain", "rounded", "bits_2", "bits_3", "bits_8", "channel", "asymmetric", "asymmetric_8", "widths", "lm_head",
    "bfloat16", "options",
]  # fmt: skip
PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PARTS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LINEARS = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in PARTS]


def few(**options):
    return {"iters": 6, **options}


@pytest.fixture(scope="module")
def batch(work, job_for):
    alike = {name: {"bits": 4, "group_size": 64} for name in LINEARS}
    widths = {name: {"bits": 8, "group_size": 32} if "down" in name else own for name, own in alike.items()}
    del widths["model.layers.1.self_attn.o_proj"]
    jobs = {
        "plain": job_for("qwen2", "autoround", options={"iters": 20}),
        "rounded": job_for("qwen2", "autoround-rtn", options={"iters": 0}),
        "bits_2": job_for("qwen2", "autoround-2", bits=2, group_size=32, options=few()),
        "bits_3": job_for("qwen2", "autoround-3", bits=3, options=few()),
        "bits_8": job_for("qwen2", "autoround-8", bits=8, options=few()),
        "channel": job_for("qwen2", "autoround-channel", group_size=-1, options=few()),
        "asymmetric": job_for("one_sided", "autoround-one-sided", options=few(sym=False)),
        "asymmetric_8": job_for("one_sided", "autoround-one-sided-8", bits=8, options=few(sym=False)),
        "widths": job_for("qwen2", "autoround-widths", linears=widths, options=few()),
        "lm_head": job_for("llama", "autoround-head", linears={**alike, "lm_head": alike[LINEARS[0]]}, options=few()),
        "bfloat16": job_for("qwen2", "autoround-bf16", dtype="bfloat16", low_memory=True, options=few()),
        "options": job_for("llama", "autoround-options", options=few(lr=0.02, batch_size=4, gradient_accumulate_steps=2)),
        "group_96": job_for("qwen2", "autoround-96", group_size=96),
        "unknown": job_for("qwen2", "autoround-unknown", linears={"model.embed_tokens": alike[LINEARS[0]]}),
        "overflow": job_for("overflow", "autoround-overflow", options=few()),
    }  # fmt: skip
    results = work("autoround", "batch", {"backend": "autoround", "jobs": jobs})
    return {label: (Path(jobs[label]["output"]), result) for label, result in results.items()}


@pytest.mark.parametrize("label", WRITTEN)
def test_what_is_written_is_exactly_what_was_computed(batch, label):
    output, result = batch[label]
    metrics = result["metrics"]
    assert metrics["written_max_difference"] == 0
    assert metrics["linears_quantized"] == metrics["linears_expected"] == {"widths": 13, "lm_head": 15}.get(label, 14)
    assert metrics["probe_max_difference"] < 1e-4 if label != "bfloat16" else True
    assert quantization_of(output).layout == "gptq"


def test_more_bits_come_closer_to_the_float_model(batch):
    labels = ("bits_8", "plain", "bits_3", "bits_2")
    errors = [batch[label][1]["metrics"]["probe_quantized_rms"] for label in labels]
    assert errors == sorted(errors)


def test_learning_lowers_the_error_of_every_block(batch):
    rows = batch["plain"][1]["layers"]
    assert [row["module"] for row in rows] == ["model.layers.0", "model.layers.1"]
    assert all(0 < row["loss"] < row["loss_rounded_to_nearest"] and row["seconds"] > 0 for row in rows)


def test_zero_points_of_zero_are_stored_masked_and_reported(batch):
    for label in ("asymmetric", "asymmetric_8"):
        assert "groups have the zero point 0" in batch[label][1]["warnings"][0]
    assert batch["plain"][1]["warnings"] == []


def test_symmetric_scales_take_the_sign_of_the_largest_weight(batch):
    output, _ = batch["plain"]
    checkpoint, info = Checkpoint.open(output), quantization_of(output)
    layers = quantized_layers(checkpoint, info)
    tensors = {suffix: checkpoint.tensor(name) for suffix, name in layers[LINEARS[0]].items() if suffix != "bias"}
    linear = LAYOUTS["gptq"].read(tensors, bits=4, group_size=64)
    assert linear.symmetric
    assert 0.2 < (linear.scales < 0).mean() < 0.8


def test_linears_with_widths_of_their_own_and_skipped_ones_are_named(batch):
    output, _ = batch["widths"]
    info = quantization_of(output)
    assert info.modules_to_not_convert == ("model.layers.1.self_attn.o_proj",)
    assert info.of("model.layers.0.mlp.down_proj").bits == 8
    assert info.of("model.layers.0.mlp.up_proj").bits == 4
    assert "model.layers.1.self_attn.o_proj.weight" in Checkpoint.open(output).names


def test_a_quantized_output_layer_is_stated(batch):
    output, _ = batch["lm_head"]
    assert json.loads((output / "config.json").read_text())["quantization_config"]["lm_head"] is True
    assert "lm_head.qweight" in Checkpoint.open(output).names


def test_low_memory_on_a_cpu_is_reported_as_without_effect(batch):
    assert "on a CPU it has no effect" in batch["bfloat16"][1]["warnings"][0]


def test_a_group_size_that_does_not_divide_names_every_layer(batch):
    assert batch["group_96"][1]["refused"].count("does not divide its input width") == 14
    assert batch["group_96"][1]["left"] == []


def test_what_is_no_linear_of_a_block_is_refused(batch):
    assert "model.embed_tokens and 0 other linears of this model" in batch["unknown"][1]["refused"]


def test_values_beyond_float16_are_refused(batch):
    assert "model.norm.weight has values up to" in batch["overflow"][1]["refused"]


@pytest.fixture(scope="module")
def crashed(killed, work, job_for, tmp_path_factory):
    """Outputs and results of a job without interruption, of the same one gone on with after a crash."""
    folder = tmp_path_factory.mktemp("crash")
    (folder / "work").mkdir()
    options = {"iters": 60, "batch_size": 4}
    whole = job_for("qwen2", "autoround-whole", options=options, work=str(tmp_path_factory.mktemp("whole")))
    broken = job_for("qwen2", "autoround-broken", options=options, work=str(folder / "work"))
    killed("autoround", broken, label="model.layers.1")  # when its second block has begun
    kept = sorted(path.name for path in (folder / "work").glob("autoround-*/*/*"))
    module = "quantline.toolchains.workers.quantizers.autoround"
    results = {label: work("autoround", module, job) for label, job in {"whole": whole, "broken": broken}.items()}
    return {"outputs": (whole["output"], broken["output"]), "results": results, "kept": kept, "work": folder / "work"}


def test_a_killed_run_goes_on_after_the_last_finished_block(crashed):
    assert crashed["kept"] == ["block-00001.pt", "next.pt"]
    assert crashed["results"]["broken"]["metrics"]["blocks_resumed"] == 1
    assert crashed["results"]["whole"]["metrics"]["blocks_resumed"] == 0


def test_equal_jobs_give_equal_bytes_interrupted_or_not(crashed):
    first, second = map(Path, crashed["outputs"])
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_nothing_is_kept_after_success(crashed):
    assert list(crashed["work"].iterdir()) == []


def test_float_weights_that_were_skipped_stay_as_they_were(batch, models):
    source = dict(iter_dequantized(models / "qwen2" / "model"))
    name = "model.layers.1.self_attn.o_proj.weight"
    written = dict(iter_dequantized(batch["widths"][0]))[name]
    np.testing.assert_array_equal(written, source[name].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits=5: autoround takes 2, 3, 4, 8"),
        ({"linears": {"a": {"bits": 6, "group_size": 64}}}, "bits=6: autoround takes 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0: autoround takes -1 or a divisor"),
        ({"options": {"iters": -1}}, "iters=-1: autoround takes an integer of at least 0"),
        ({"options": {"batch_size": 0}}, "batch_size=0"),
        ({"options": {"lr": 2}}, "lr=2: autoround takes a number between 0 and 1"),
        ({"options": {"clip": True}}, "options clip: autoround has batch_size"),
        ({"dtype": "float16"}, "dtype=float16: autoround learns in bfloat16 or float32 on a CPU"),
    ],
)
def test_what_the_library_fails_on_late_is_refused_early(values, message):
    with pytest.raises(JobError, match=message):
        autoround.check({"bits": 4, "group_size": 64, "device": "cpu", **values})
