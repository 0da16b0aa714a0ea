import json

import numpy as np
import pytest

from quantline.checkpoint import Checkpoint, iter_dequantized, write_safetensors
from quantline.convert import convert
from quantline.errors import UserError
from quantline.formats import LAYOUTS, quantize_rtn


def make_checkpoint(folder, layout, bits, *, symmetric, shards=1):
    folder.mkdir()
    random = np.random.default_rng(0)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": symmetric}
    if layout.startswith("awq"):
        settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
        settings["version"] = layout.removeprefix("awq_")
    else:
        settings["checkpoint_format"] = layout
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": settings}))
    (folder / "tokenizer_config.json").write_text("{}")
    weight_map = {}
    for index in range(2):
        weight = random.normal(size=(64, 96)).astype(np.float32)
        weight[0, :32] = np.abs(weight[0, :32])  # a one-sided group: its zero point is 0
        name = f"model.layers.{index}.mlp.up_proj"
        stored = LAYOUTS[layout].write(quantize_rtn(weight, bits, 32, symmetric))
        tensors = {f"{name}.{suffix}": value for suffix, value in stored.items()}
        tensors[f"model.layers.{index}.norm.weight"] = np.ones(96, np.float16)
        if shards == 1:
            weight_map.update(tensors)
            continue
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        write_safetensors(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weight_map)
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def weights(folder):
    return {name: np.array(value) for name, value in iter_dequantized(folder)}


def format_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shards", [1, 2])
def test_gptq_v1_to_v2_and_back_keeps_every_weight(tmp_path, bits, shards):
    source = make_checkpoint(tmp_path / "v1", "gptq", bits, symmetric=True, shards=shards)
    for name, target in (("a", "gptq_v2"), ("b", "gptq")):
        (tmp_path / name).mkdir()
        report = convert(source, tmp_path / name, target)
        assert (report.target, report.linears, report.carried) == (target, 2, 2)
        assert format_of(tmp_path / name)["checkpoint_format"] == target
        assert json.loads((tmp_path / name / "quantize_config.json").read_text())["checkpoint_format"] == target
        source = tmp_path / name
    before, after = weights(tmp_path / "v1"), weights(source)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert Checkpoint.open(source).tensor_hashes() == Checkpoint.open(tmp_path / "v1").tensor_hashes()


def test_v1_and_v2_differ_by_one_in_every_zero_point_field(tmp_path):
    source = make_checkpoint(tmp_path / "v1", "gptq", 4, symmetric=True)
    (tmp_path / "v2").mkdir()
    convert(source, tmp_path / "v2", "gptq_v2")
    name = "model.layers.0.mlp.up_proj.qzeros"
    one, two = (Checkpoint.open(tmp_path / folder).tensor(name).view(np.uint32) for folder in ("v1", "v2"))
    assert np.array_equal(one + np.uint32(0x11111111), two)


def test_auto_keeps_a_layout_that_serves_byte_for_byte(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()
    report = convert(source, tmp_path / "out", "auto")
    assert report.source == report.target == "gptq"
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_auto_brings_awq_gemv_to_gemm_with_equal_weights(tmp_path):
    source = make_checkpoint(tmp_path / "in", "awq_gemv", 4, symmetric=False)
    (tmp_path / "out").mkdir()
    assert convert(source, tmp_path / "out", "auto").target == "awq_gemm"
    assert format_of(tmp_path / "out")["version"] == "gemm"
    before, after = weights(source), weights(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_source_is_not_touched(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "gptq_v2")
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


def test_awq_into_gptq_is_refused_by_name(tmp_path):
    source = make_checkpoint(tmp_path / "in", "awq_gemm", 4, symmetric=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="awq_gemm checkpoint is not brought to gptq"):
        convert(source, tmp_path / "out", "gptq")


def test_a_float_checkpoint_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    write_safetensors(tmp_path / "in" / "model.safetensors", {"w": np.zeros((2, 2), np.float16)})
    with pytest.raises(UserError, match="not quantized"):
        convert(tmp_path / "in", tmp_path / "out", "auto")
