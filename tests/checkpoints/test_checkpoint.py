from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, CheckpointError, quantization_of, write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS, dequantize, quantize_rtn
from quantline.checkpoints.quantization_config import describe, float_config, is_quantized
from quantline.checkpoints.safetensors_file import numpy_dtype

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def config(folder: Path, quantization: object = None, **others: object) -> Path:
    content = dict(others) if quantization is None else {**others, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def sharded(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str] | None = None) -> Path:
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    listed = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": listed if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_layout_that_config_json_cannot_describe_is_refused_with_those_that_it_can():
    with pytest.raises(
        CheckpointError, match=r"msmodelslim: config\.json cannot describe it; it describes awq_gemm, .*, bits"
    ):
        describe("msmodelslim", bits=8, group_size=-1, symmetric=True)


# Headers


# Writing


# bfloat16


# Folders


def test_a_single_file_is_opened(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "model.safetensors", {"b": np.arange(3, dtype=np.int32), "a": np.array(2.5, np.float32)}
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == ["a", "b"]
    assert checkpoint.info("b").shape == (3,)
    assert checkpoint.tensor("b").tolist() == [0, 1, 2]
    assert checkpoint.tensor("a").shape == ()
    assert not checkpoint.tensor("b").flags.writeable
    with pytest.raises(CheckpointError, match="has no tensor c"):
        checkpoint.info("c")


def test_shards_are_opened_through_their_index(tmp_path: Path) -> None:
    sharded(tmp_path, {"m-1.safetensors": {"a": np.zeros(2)}, "m-2.safetensors": {"b": np.ones((0, 3), np.float16)}})
    checkpoint = Checkpoint.open(tmp_path)
    assert dict(checkpoint.shards) == {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    assert checkpoint.tensor("b").shape == (0, 3)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/../../outside.safetensors",
        "linked/outside.safetensors",
        "sub//x",
        "..",
        "a\\b",
        "",
    ],
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "outside.safetensors", {"a": np.zeros(2)})
    (folder / "sub").mkdir()
    (folder / "linked").symlink_to(tmp_path)
    sharded(folder, {}, {"a": name})
    with pytest.raises(CheckpointError, match="is no file inside its folder"):
        Checkpoint.open(folder)


def test_shards_may_lie_in_folders_below_their_index(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    sharded(tmp_path, {"a/b/1.safetensors": {"a": np.ones(2)}, "2.safetensors": {"b": np.zeros(2)}})
    assert Checkpoint.open(tmp_path).tensor("a").tolist() == [1, 1]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"m-1.safetensors": {"a": np.zeros(2)}, "m-2.safetensors": {"b": np.zeros(2)}})
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard m-2\.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_index_and_shards_must_agree_both_ways(tmp_path: Path) -> None:
    shards = {"m.safetensors": {"a": np.zeros(2)}}
    sharded(tmp_path, shards, {"a": "m.safetensors", "b": "m.safetensors"})
    with pytest.raises(CheckpointError, match=r"lists b in m\.safetensors, which does not have it"):
        Checkpoint.open(tmp_path)
    sharded(tmp_path, {"m.safetensors": {"a": np.zeros(2), "c": np.zeros(1)}}, {"a": "m.safetensors"})
    with pytest.raises(CheckpointError, match=r"does not list c of m\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        (["pytorch_model.bin"], r"pickled weights only \(pytorch_model.bin\)"),
        (["consolidated.00.pth"], "pickled weights only"),
        (["model.pt"], "pickled weights only"),
        (["gptq_model-4bit-128g.safetensors"], "rename it"),
        (["config.json"], "give a complete model"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, not a model: merge it"),
        (["model.safetensors", "model.safetensors.index.json"], "remove the outdated one"),
    ],
)
def test_folders_without_one_set_of_weights_are_refused(tmp_path: Path, files: list[str], fact: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=fact):
        Checkpoint.open(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "absent")


# Quantization configs


def test_a_config_without_quantization_is_a_float_checkpoint(tmp_path: Path) -> None:
    assert quantization_of(config(tmp_path, model_type="qwen2")) is None


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (AWQ, ("awq", "awq_gemm", 4, 32, False, False, ())),
        ({**AWQ, "version": "GEMV", "zero_point": False}, ("awq", "awq_gemv", 4, 32, False, True, ())),
        ({**AWQ, "modules_to_not_convert": ["lm_head"]}, ("awq", "awq_gemm", 4, 32, False, False, ("lm_head",))),
        (GPTQ, ("gptq", "gptq", 4, 32, False, True, ())),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "bits": 3}, ("gptq", "gptq_v2", 3, 32, False, True, ())),
        ({**GPTQ, "desc_act": True, "sym": False, "group_size": -1}, ("gptq", "gptq", 4, -1, True, False, ())),
    ],
)
def test_known_quantizations_name_their_layout(
    tmp_path: Path, quantization: object, expected: tuple[object, ...]
) -> None:
    info = quantization_of(config(tmp_path, quantization))
    assert info is not None
    fields = (info.method, info.layout, info.bits, info.group_size, info.desc_act, info.symmetric)
    assert (*fields, info.modules_to_not_convert) == expected
    assert info.layout in LAYOUTS


@pytest.mark.parametrize(
    ("quantization", "fact"),
    [
        ({"quant_method": "quanto"}, "quant_method is 'quanto'"),
        ({**AWQ, "version": "gemv_fast"}, "stored as 'gemv_fast'"),
        ({**AWQ, "bits": 8}, "bits is 8: awq takes 4"),
        ({**GPTQ, "bits": 5}, "gptq takes 2 or 3 or 4 or 8"),
        ({**GPTQ, "bits": True}, "bits is True"),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "stored as 'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "stored as 'marlin'"),
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 5}}}, "bits must be 2, 3, 4 or 8"),
        ([1], "not a JSON object"),
    ],
)
def test_unknown_quantizations_are_refused(tmp_path: Path, quantization: object, fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact):
        quantization_of(config(tmp_path, quantization))


def test_auto_gptqs_own_config_is_read_and_must_agree(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    info = quantization_of(tmp_path)
    assert info is not None
    assert info.layout == "gptq"
    assert quantization_of(config(tmp_path, {**GPTQ, "checkpoint_format": "gptq_v2"})) is not None
    config(tmp_path, {**GPTQ, "group_size": 64})
    with pytest.raises(CheckpointError, match=r"group_size is 64, but quantize_config\.json says 32"):
        quantization_of(tmp_path)


OLD_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize("place", ["text_config", "compression_config", "both", "quant_config.json"])
def test_the_section_is_found_wherever_tools_put_it(tmp_path: Path, place: str) -> None:
    packed = describe("compressed_tensors", bits=4, group_size=32, symmetric=True)
    old = {key: value for key, value in packed.items() if key != "quant_method"}
    content = {
        "text_config": {"text_config": {"quantization_config": GPTQ}},
        "compression_config": {"compression_config": old},
        "both": {"text_config": {"compression_config": old}},
        "quant_config.json": {},
    }[place]
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "x"}))
    if not content:
        (tmp_path / place).write_text(json.dumps(OLD_AWQ))
    info = quantization_of(tmp_path)
    assert info is not None
    layout = {"text_config": "gptq", "quant_config.json": "awq_gemm"}.get(place, "compressed_tensors")
    assert (info.layout, info.bits, info.group_size) == (layout, 4, 32)
    assert is_quantized(content) == (place != "quant_config.json")
    assert not is_quantized(float_config(content))


def test_autoawqs_own_file_must_agree_in_its_own_words(tmp_path: Path) -> None:
    config(tmp_path, AWQ)
    (tmp_path / "quant_config.json").write_text(json.dumps({**OLD_AWQ, "q_group_size": 64}))
    with pytest.raises(CheckpointError, match=r"group_size is 32, but quant_config\.json says 64"):
        quantization_of(tmp_path)


def test_a_description_without_a_known_algorithm_is_refused(tmp_path: Path) -> None:
    config(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ModelOpt with quant_algo None: known are FP8, NVFP4"):
        quantization_of(tmp_path)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        quantization_of(tmp_path)


# Dequantizing


def model(folder: Path, layout: str, quantization: dict[str, Any], edit: Callable[[dict[str, Any]], object]) -> Path:
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    packed = LAYOUTS[layout].write(quantize_rtn(weight, 4, 32, True))
    tensors = {f"m.q_proj.{suffix}": array for suffix, array in packed.items()}
    tensors |= {"m.q_proj.bias": np.zeros(32, np.float16), "m.norm.weight": np.full(4, 0.5, np.float16)}
    edit(tensors)
    write_safetensors(folder / "model.safetensors", tensors)
    return config(folder, quantization)


@pytest.mark.parametrize(
    ("layout", "quantization"),
    [
        ("awq_gemm", AWQ),
        ("awq_gemv", {**AWQ, "version": "gemv"}),
        ("gptq", GPTQ),
        ("gptq_v2", {**GPTQ, "checkpoint_format": "gptq_v2"}),
    ],
)
def test_parameters_come_under_their_float_names(tmp_path: Path, layout: str, quantization: dict[str, Any]) -> None:
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    found = dict(iter_dequantized(model(tmp_path, layout, quantization, lambda tensors: None)))
    assert sorted(found) == ["m.norm.weight", "m.q_proj.bias", "m.q_proj.weight"]
    assert np.array_equal(found["m.q_proj.weight"], dequantize(quantize_rtn(weight, 4, 32, True)))
    assert found["m.norm.weight"].tolist() == [0.5] * 4
    assert all(array.dtype == np.float32 for array in found.values())


def test_a_float_checkpoint_is_only_widened(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 2), np.float16)})
    config(tmp_path)
    assert [(name, array.dtype.name) for name, array in iter_dequantized(tmp_path)] == [("a.weight", "float32")]


def test_bfloat16_scales_are_read_with_and_without_ml_dtypes(tmp_path: Path, ml_dtypes_or_not: bool) -> None:
    bits = np.full((2, 32), 0x3E80, np.uint16)  # 0.25

    def edit(tensors: dict[str, Any]) -> None:
        tensors["m.q_proj.scales"] = bits.view(numpy_dtype("BF16"))

    found = dict(iter_dequantized(model(tmp_path, "gptq", GPTQ, edit)))
    assert set(np.unique(found["m.q_proj.weight"] * 4 % 1)) == {0.0}


@pytest.mark.parametrize(
    ("edit", "fact"),
    [
        (lambda tensors: tensors.pop("m.q_proj.scales"), "m.q_proj lacks scales"),
        (lambda tensors: tensors.pop("m.q_proj.qweight"), "m.q_proj lacks qweight"),
        (
            lambda tensors: tensors.update({"m.q_proj.weight": np.zeros((32, 64), np.float16)}),
            "packed tensors and a float weight",
        ),
        (lambda tensors: tensors.update({"m.q_proj.qzeros": np.zeros((1, 4), np.int32)}), "m.q_proj: qzeros has shape"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".q" in name and "bias" not in name],
            "no linear is packed",
        ),
    ],
)
def test_config_and_tensors_must_agree(tmp_path: Path, edit: Callable[[dict[str, Any]], object], fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact):
        list(iter_dequantized(model(tmp_path, "gptq", GPTQ, edit)))


def test_packed_tensors_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    config(model(tmp_path, "gptq", GPTQ, lambda tensors: None))
    with pytest.raises(CheckpointError, match=r"m\.q_proj is packed"):
        list(iter_dequantized(tmp_path))
