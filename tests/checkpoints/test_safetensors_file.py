from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.checkpoints import safetensors_file
from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.safetensors_file import (
    SafetensorsFile,
    numpy_dtype,
    read_header,
    to_float32,
    write_safetensors,
)
from quantline.core.errors import CheckpointError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3), "odd": np.arange(7, dtype=np.int8),
    "scalar": np.float16(2.5).reshape(()), "empty": np.zeros((0, 4), np.int32), "large": np.arange(5000, dtype=np.int16),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    return SafetensorsFile.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("how", ["view", "read"])
def test_a_tensor_is_what_was_written(file, name, how):
    found = getattr(file, how)(name)
    assert (found.dtype, found.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert np.array_equal(found, TENSORS[name])
    assert found.flags.writeable is (how == "read")


def test_a_view_outlives_the_file_and_keeps_no_descriptor(file):
    def open_here():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.lexists(link) and str(file.path) in os.readlink(link)]

    views = [file.view("large") for _ in range(20)]
    # A mapping has its own copy of the descriptor, and both go with the array.
    file.path.unlink()
    assert np.array_equal(views[0], TENSORS["large"])
    del views
    assert open_here() == []


@pytest.mark.parametrize("size", [1, 1000, 10_000, 1 << 20])
def test_the_chunks_of_a_tensor_are_its_bytes(file, size, monkeypatch):
    monkeypatch.setattr(safetensors_file, "CHUNK", size)
    chunks = list(file.chunks("large"))
    assert b"".join(chunks) == TENSORS["large"].tobytes()
    assert {len(chunk) for chunk in chunks[:-1]} <= {size}
    assert list(file.chunks("empty")) == []


@pytest.mark.parametrize("name", TENSORS)
def test_the_hash_is_over_dtype_shape_and_bytes(file, name):
    info = file.infos[name]
    head = f'["{info.dtype}", {list(info.shape)}]'.encode()
    assert file.sha256(name) == hashlib.sha256(head + TENSORS[name].tobytes()).hexdigest()


@pytest.mark.parametrize("ask", [SafetensorsFile.view, SafetensorsFile.read, SafetensorsFile.sha256,
                                 lambda file, name: list(file.chunks(name))])  # fmt: skip
def test_missing_tensors_and_files_that_shrank_or_vanished_are_errors(file, ask):
    with pytest.raises(CheckpointError, match="has no tensor b"):
        ask(file, "b")
    last = max(file.infos, key=lambda name: (file.infos[name].offset, file.infos[name].nbytes))
    with file.path.open("r+b") as shorter:
        shorter.truncate(file.infos[last].offset + 1)
    with pytest.raises(CheckpointError, match=r"ends (inside|before)"):
        ask(file, last)
    file.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ask(file, last)


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_header_gives_dtype_shape_and_place(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("F16", [2], [4, 8]), "a": entry("F32", [], [0, 4])}
    path = raw(tmp_path / "x", header, bytes(8))
    infos = read_header(path)
    start = path.stat().st_size - 8
    assert list(infos) == ["a", "b"]
    assert (infos["a"].dtype, infos["a"].shape, infos["a"].offset, infos["a"].nbytes) == ("F32", (), start, 4)
    assert (infos["b"].shape, infos["b"].offset) == ((2,), start + 4)


def test_null_as_metadata_is_none(tmp_path: Path) -> None:
    path = raw(tmp_path / "x", {"__metadata__": None, "a": entry()}, bytes(4))
    assert list(read_header(path)) == ["a"]


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
        ({"a": entry()}, bytes(5), None, "but the file has"),
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
        assert len(list(tmp_path.glob(".x.safetensors.partial-*/x.safetensors"))) == 1
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
