from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    iter_dequantized,
    quantization_of,
    read_header,
    to_float32,
    write_safetensors,
)
from quantline.checkpoints.layouts import LAYOUTS, dequantize, quantize_rtn
from quantline.checkpoints.safetensors_file import numpy_dtype, safetensors_dtype

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


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


# Headers


def test_header_gives_dtype_shape_and_place(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("F16", [2], [4, 8]), "a": entry("F32", [], [0, 4])}
    path = raw(tmp_path / "x", header, bytes(8))
    infos = read_header(path)
    start = path.stat().st_size - 8
    assert list(infos) == ["a", "b"]
    assert (infos["a"].dtype, infos["a"].shape, infos["a"].offset, infos["a"].nbytes) == ("F32", (), start, 4)
    assert (infos["b"].shape, infos["b"].offset) == ((2,), start + 4)


@pytest.mark.parametrize(
    ("header", "data", "length", "fact"),
    [
        (b"", b"", 1 << 60, "a header of 1152921504606846976 bytes in a file of 8 bytes"),
        (b"{}", b"", 3, "a header of 3 bytes in a file of 10 bytes"),
        (b"{", b"", None, "not valid JSON"),
        (b"\xff\xff", b"", None, "not valid JSON"),
        (b"[]", b"", None, "not a JSON object"),
        (b'{"a":{},"a":{}}', b"", None, "occurs twice"),
        ({"__metadata__": {"format": 1}}, b"", None, "mapping of strings"),
        ({"a": 1}, bytes(4), None, "tensor a has dtype None"),
        ({"a": entry("F12")}, bytes(4), None, "tensor a has dtype 'F12'"),
        ({"a": entry(shape=[-1])}, bytes(4), None, "tensor a has shape"),
        ({"a": entry(shape=[True])}, bytes(4), None, "tensor a has shape"),
        ({"a": entry(offsets=[0])}, bytes(4), None, "tensor a has shape"),
        ({"a": entry(shape=[2])}, bytes(4), None, "needs 8 bytes"),
        ({"a": entry(offsets=[4, 0])}, bytes(4), None, "needs 4 bytes"),
        ({"a": entry(), "b": entry()}, bytes(4), None, "tensor b starts at byte"),
        ({"a": entry(offsets=[4, 8])}, bytes(8), None, "tensor a starts at byte"),
        ({"a": entry()}, bytes(3), None, "truncated"),
        ({"a": entry()}, bytes(5), None, "the file has"),
    ],
)
def test_damaged_headers_are_refused_with_file_fact_and_remedy(
    tmp_path: Path, header: object, data: bytes, length: int | None, fact: str
) -> None:
    path = raw(tmp_path / "damaged.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=fact) as caught:
        read_header(path)
    assert "damaged.safetensors" in str(caught.value)


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            read_header(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: cannot be read"):
        read_header(tmp_path / "absent")


# Writing


def test_what_is_written_is_what_the_reference_library_reads(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    tensors = {
        "z.odd": np.arange(3, dtype=np.int8),
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.ones((2, 0), np.float16),
        "scalar": np.array(5, np.int64),
        "flag": np.array([True, False]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"note": "ä"})
    read = reference.load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)


def test_the_file_is_aligned_deterministic_and_says_format_pt(tmp_path: Path) -> None:
    first = {"b": np.arange(3, dtype=np.uint8), "c": np.ones(2, np.float64), "a": np.ones(1, np.float32)}
    write_safetensors(tmp_path / "1", first)
    write_safetensors(tmp_path / "2", dict(reversed(first.items())))
    data = (tmp_path / "1").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert data == (tmp_path / "2").read_bytes()
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    infos = read_header(tmp_path / "1")
    assert list(infos) == ["c", "a", "b"]
    assert all(info.offset % np.dtype(numpy_dtype(info.dtype)).itemsize == 0 for info in infos.values())


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(4, np.float32)})
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        assert len(list(tmp_path.glob("x.safetensors.*.tmp"))) == 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantline.core.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, {"a": np.ones(4, np.float32)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_hard_link_to_the_old_file_keeps_its_content(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "cached"
    write_safetensors(path, {"a": np.zeros(4, np.float32)})
    link.hardlink_to(path)
    write_safetensors(path, {"a": np.ones(4, np.float32)})
    assert link.read_bytes() != path.read_bytes()


def test_what_the_container_has_no_word_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        write_safetensors(tmp_path / "x", {"a": np.zeros(1, np.complex128)})
    with pytest.raises(CheckpointError, match="__metadata__"):
        write_safetensors(tmp_path / "x", {"__metadata__": np.zeros(1)})
    assert not list(tmp_path.iterdir())


# bfloat16


@pytest.fixture(params=["with ml_dtypes", "without"])
def ml_dtypes_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    present = bool(request.param == "with ml_dtypes")
    if present:
        pytest.importorskip("ml_dtypes")
    else:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    numpy_dtype.cache_clear()
    safetensors_dtype.cache_clear()
    yield present
    numpy_dtype.cache_clear()
    safetensors_dtype.cache_clear()


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path, ml_dtypes_or_not: bool) -> None:
    bits = np.array([0x3F80, 0xC000, 0x3DCD], np.uint16)  # 1, -2, 0.1 rounded
    raw(tmp_path / "model.safetensors", {"w": entry("BF16", [3], [0, 6])}, bits.tobytes())
    tensor = Checkpoint.open(tmp_path).tensor("w")
    assert tensor.dtype.name == "bfloat16" if ml_dtypes_or_not else tensor.dtype.names == ("BF16",)
    assert to_float32(tensor).tolist() == [1.0, -2.0, 0.10009765625]
    write_safetensors(tmp_path / "copy", {"w": tensor})
    assert read_header(tmp_path / "copy")["w"].dtype == "BF16"
    assert (tmp_path / "copy").read_bytes().endswith(bits.tobytes())


def test_float8_needs_ml_dtypes(tmp_path: Path, ml_dtypes_or_not: bool) -> None:
    raw(tmp_path / "model.safetensors", {"w": entry("F8_E4M3", [1], [0, 1])}, b"\x38")
    tensor = Checkpoint.open(tmp_path).tensor("w")
    if ml_dtypes_or_not:
        assert to_float32(tensor).tolist() == [1.0]
    else:
        with pytest.raises(CheckpointError, match="ml_dtypes"):
            to_float32(tensor)


def test_to_float32_keeps_float32_and_widens_the_rest() -> None:
    array = np.ones(2, np.float32)
    assert to_float32(array) is array
    assert to_float32(np.array([0.5], np.float16)).dtype == np.float32
    assert to_float32(np.array([True])).tolist() == [1.0]


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


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b", ""])
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "outside.safetensors", {"a": np.zeros(2)})
    sharded(folder, {}, {"a": name})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"m-1.safetensors": {"a": np.zeros(2)}, "m-2.safetensors": {"b": np.zeros(2)}})
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard m-2\.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_index_and_shards_must_agree_both_ways(tmp_path: Path) -> None:
    shards = {"m.safetensors": {"a": np.zeros(2)}}
    sharded(tmp_path, shards, {"a": "m.safetensors", "b": "m.safetensors"})
    with pytest.raises(CheckpointError, match=r"lists b in m\.safetensors, which does not hold it"):
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
        (["config.json"], "download the model first"),
        (["model.safetensors", "model.safetensors.index.json"], "remove the one that is out of date"),
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
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 5}}}, "bits are 2, 3, 4 or 8"),
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
    with pytest.raises(CheckpointError, match=r"group_size is 64, quantize_config\.json says 32"):
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
        (lambda tensors: tensors.update({"m.q_proj.weight": np.zeros((32, 64), np.float16)}), "packed and as float"),
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
