from __future__ import annotations

import json

import numpy as np
import pytest

from quantline.checkpoint import quantization_of, write_safetensors
from quantline.errors import UserError, WorkerError
from quantline.jobs import JobResult
from quantline.quantization import check_group_size, check_output, linear_shapes, quantize


@pytest.fixture(scope="module")
def model(root):
    return root / "assets" / "demo" / "model"


@pytest.fixture
def request_of(model, tmp_path):
    """Arguments of `quantize`, round to nearest on the demo model."""

    def of(**changes):
        out = tmp_path / "out"
        out.mkdir()
        method = {"name": "rtn", "backend": "native", "sym": True}
        return {
            "method": method, "bits": 4, "group_size": 128, "seed": 0, "threads": 1, "device": "cpu", "model": model,
            "probe": tmp_path / "probe.safetensors", "calibration": None, "out": out, "run_worker": None, **changes,
        }  # fmt: skip

    return of


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """A whole output: 4 bits in groups of 128."""
    out = tmp_path_factory.mktemp("quantized")
    method = {"name": "rtn", "backend": "native", "sym": True}
    quantize(
        method=method, bits=4, group_size=128, seed=0, threads=1, device="cpu", model=model, probe=out / "none",
        calibration=None, out=out, run_worker=None,
    )  # fmt: skip
    return out


def write(folder, **shapes):
    tensors = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_the_linears_of_a_model_are_those_of_its_layers(model):
    shapes = linear_shapes(model)
    assert len(shapes) == 35
    assert {width for _, width in shapes.values()} >= {384}
    assert not [name for name in shapes if "embed" in name or "norm" in name or "lm_head" in name]


def test_a_group_size_that_does_not_divide_names_the_layer_and_those_that_do(tmp_path):
    write(tmp_path, up=(16, 192), down=(8, 128))
    with pytest.raises(UserError, match=r"group_size=128: .* 1 linears \(first: model\.layers\.0\.up, 192\)") as caught:
        check_group_size(tmp_path, 128)
    assert str(caught.value).endswith("group_size=32 or 64 divides them all")
    check_group_size(tmp_path, 64)
    check_group_size(tmp_path, -1)


def test_where_no_group_size_divides_a_scale_for_each_channel_is_advised(tmp_path):
    write(tmp_path, up=(16, 100))
    with pytest.raises(UserError, match="try group_size=-1"):
        check_group_size(tmp_path, 32)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, 32), (3, 64), (4, -1)])
def test_round_to_nearest_needs_no_worker_and_quantizes_every_linear(request_of, bits, group_size):
    arguments = request_of(bits=bits, group_size=group_size)
    outcome = quantize(**arguments)
    info = quantization_of(arguments["out"])
    assert (info.bits, info.group_size) == (bits, group_size)
    assert outcome.metrics
    check_output(arguments["out"], bits, group_size, expected=35)


def test_a_backend_gets_its_options_and_all_that_decides_its_result(request_of, tmp_path):
    jobs = []

    def worker(toolchain, module, job, label):
        jobs.append((toolchain, module, job))
        raise WorkerError("stop here")

    method = {"name": "gptq", "backend": "auto_gptq", "damp_percent": 0.01, "desc_act": True}
    tokens = tmp_path / "tokens.safetensors"
    with pytest.raises(WorkerError, match="stop here"):
        quantize(**request_of(method=method, bits=8, seed=3, threads=2, calibration=tokens, run_worker=worker))
    ((toolchain, module, job),) = jobs
    assert (toolchain, module) == ("auto_gptq", "quantline.backends.auto_gptq")
    assert job["options"] == {"damp_percent": 0.01, "desc_act": True}
    assert (job["bits"], job["group_size"], job["seed"], job["threads"]) == (8, 128, 3, 2)
    assert job["calibration"] == str(tokens)
    json.dumps(job)


def test_a_worker_that_writes_nothing_is_no_success(request_of):
    def worker(toolchain, module, job, label):
        return JobResult({"metrics": {}}, 1.0, 0)

    method = {"name": "awq", "backend": "autoawq", "zero_point": True}
    with pytest.raises(UserError):
        quantize(**request_of(method=method, run_worker=worker))


def test_an_output_with_other_bits_or_groups_than_asked_for_is_refused(quantized):
    with pytest.raises(WorkerError, match="asked for 8 bits in groups of 128, got 4 in 128"):
        check_output(quantized, 8, 128, expected=35)
    with pytest.raises(WorkerError, match="asked for 4 bits in groups of 64, got 4 in 128"):
        check_output(quantized, 4, 64, expected=35)


def test_an_output_that_leaves_linears_out_is_refused(quantized):
    with pytest.raises(WorkerError, match="35 of 36 linears were quantized; the backend skipped"):
        check_output(quantized, 4, 128, expected=36)


def test_an_output_that_was_not_quantized_is_refused(model):
    with pytest.raises(WorkerError, match="nothing was quantized"):
        check_output(model, 4, 128, expected=35)


def test_an_output_without_its_tokenizer_is_refused(quantized, tmp_path):
    for path in quantized.iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(WorkerError, match="lacks tokenizer_config"):
        check_output(tmp_path, 4, 128, expected=35)
