from __future__ import annotations

import json

import pytest

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import select_linears
from quantline.core.errors import UserError, WorkerError
from quantline.quantization.capabilities import Requirements
from quantline.quantization.quantize import Request, check_output, quantize
from quantline.toolchains.protocol import JobResult


@pytest.fixture(scope="module")
def model(root):
    return root / "assets" / "demo" / "model"


def request(**changes):
    """Round to nearest, 4 bits in groups of 128."""
    method = changes.pop("method", {"name": "rtn", "sym": True})
    bits, group_size = changes.pop("bits", 4), changes.pop("group_size", 128)
    requirements = Requirements(
        method["name"], bits, group_size, {key: value for key, value in method.items() if key != "name"}
    )
    order = {"rtn": ["native"], "gptq": ["auto_gptq"], "awq": ["autoawq"]}[method["name"]]
    values = {"backend": "auto", "order": order, "requirements": requirements, "threads": 1, **changes}
    return Request(method=method, bits=bits, group_size=group_size, **values)


def no_worker(toolchain, module, job, label):
    raise AssertionError("round to nearest needs no worker")


@pytest.fixture
def places(model, tmp_path):
    """Where `quantize` reads and writes."""
    (tmp_path / "out").mkdir()
    return {
        "model": model, "probe": tmp_path / "probe.safetensors", "calibration": tmp_path / "tokens.safetensors",
        "out": tmp_path / "out", "work": tmp_path / "work",
    }  # fmt: skip


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """A whole output: 4 bits in groups of 128."""
    out = tmp_path_factory.mktemp("quantized")
    none = out / "none"
    quantize(request(), model=model, probe=none, calibration=none, out=out, work=none, run_worker=no_worker)
    return out


@pytest.fixture(scope="module")
def widths(model):
    """What that output was asked for."""
    return select_linears(Checkpoint.open(model), {}, bits=4, group_size=128)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, 32), (3, 64), (4, -1)])
def test_round_to_nearest_needs_no_worker_and_quantizes_every_linear(places, bits, group_size):
    outcome = quantize(request(bits=bits, group_size=group_size), **places, run_worker=no_worker)
    info = quantization_of(places["out"])
    assert (info.bits, info.group_size) == (bits, group_size)
    assert outcome.metrics["linears_quantized"] == 35
    assert outcome.backend == "native"


def test_rules_by_layer_give_other_bits_and_leave_linears_float(places):
    rules = [{"match": "*.layers.0.*", "skip": True}, {"match": "*.self_attn.*", "bits": 8, "group_size": 64}]
    outcome = quantize(request(rules=rules), **places, run_worker=no_worker)
    info, checkpoint = quantization_of(places["out"]), Checkpoint.open(places["out"])
    assert "model.layers.0.mlp.up_proj.weight" in checkpoint.names
    assert (info.of("model.layers.1.self_attn.q_proj").bits, info.of("model.layers.1.self_attn.q_proj").group_size) == (
        8,
        64,
    )
    assert (info.of("model.layers.1.mlp.up_proj").bits, info.of("model.layers.1.mlp.up_proj").group_size) == (4, 128)
    assert checkpoint.info("model.layers.1.self_attn.q_proj.qweight").shape[0] * 4 == 384
    assert outcome.metrics["linears_quantized"] == 28
    config = json.loads((places["out"] / "config.json").read_text())["quantization_config"]
    # vLLM asks for the fused module.
    assert any("qkv_proj" in pattern for pattern in config["dynamic"])


def test_a_rule_that_matches_nothing_is_refused_with_a_name_that_would_do(places):
    with pytest.raises(UserError, match=r"\*\.attention\.\* matches no linear.*model\.layers\.0\."):
        quantize(request(rules=[{"match": "*.attention.*", "bits": 8}]), **places, run_worker=no_worker)


def test_a_backend_gets_its_options_and_all_that_decides_its_result(places):
    jobs = []

    def worker(toolchain, module, job, label):
        jobs.append((toolchain, module, job))
        raise WorkerError("stop here")

    method = {"name": "gptq", "damp_percent": 0.01, "desc_act": True}
    with pytest.raises(WorkerError, match="stop here"):
        quantize(request(method=method, bits=8, seed=3, threads=2), **places, run_worker=worker)
    ((toolchain, module, job),) = jobs
    assert (toolchain, module) == ("auto_gptq", "quantline.toolchains.workers.quantizers.auto_gptq")
    assert job["options"] == {"damp_percent": 0.01, "desc_act": True}
    assert (job["bits"], job["group_size"], job["seed"], job["threads"]) == (8, 128, 3, 2)
    assert job["calibration"] == str(places["calibration"])
    assert len(job["linears"]) == 35
    assert set(map(tuple, map(dict.items, job["linears"].values()))) == {(("bits", 8), ("group_size", 128))}
    json.dumps(job)


def test_a_worker_that_writes_nothing_is_no_success(places):
    def worker(toolchain, module, job, label):
        return JobResult({"metrics": {}}, 1.0, 0)

    with pytest.raises(UserError):
        quantize(request(method={"name": "awq", "zero_point": True}), **places, run_worker=worker)


def test_an_output_with_other_bits_or_groups_than_asked_for_is_refused(quantized, widths):
    with pytest.raises(WorkerError, match="requested 8 bits in groups of 128, got 4 in 128"):
        check_output(quantized, {name: LinearSpec(8, 128) for name in widths})
    with pytest.raises(WorkerError, match="requested 4 bits in groups of 64, got 4 in 128"):
        check_output(quantized, {name: LinearSpec(4, 64) for name in widths})


def test_an_output_that_leaves_linears_out_is_refused(quantized, widths):
    with pytest.raises(WorkerError, match=r"1 of 36 linears were silently left in float \(1 x more\)"):
        check_output(quantized, {**widths, "model.layers.0.more": LinearSpec(4, 128)})


def test_an_output_that_quantizes_what_should_stay_float_is_refused(quantized, widths):
    name = next(iter(widths))
    with pytest.raises(WorkerError, match=f"{name} was quantized but should have stayed float"):
        check_output(quantized, {other: width for other, width in widths.items() if other != name})


def test_an_output_that_was_not_quantized_is_refused(model, widths):
    with pytest.raises(WorkerError, match="nothing was quantized"):
        check_output(model, widths)


def test_an_output_without_its_tokenizer_is_refused(quantized, widths, tmp_path):
    for path in quantized.iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(WorkerError, match="has no tokenizer_config"):
        check_output(tmp_path, widths)
