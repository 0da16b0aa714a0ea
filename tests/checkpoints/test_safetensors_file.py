from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from quantline.checkpoints import safetensors_file
from quantline.checkpoints.safetensors_file import SafetensorsFile, write_safetensors
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
