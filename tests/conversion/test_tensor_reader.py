from __future__ import annotations

import numpy as np
import pytest

from quantline.checkpoints.safetensors_file import read_header, write_safetensors
from quantline.conversion import tensor_reader
from quantline.conversion.tensor_reader import TensorFiles

CODES = np.random.default_rng(0).integers(-7, 8, (64, 33)).astype(np.int8)


@pytest.fixture
def tensors(tmp_path):
    write_safetensors(tmp_path / "one.safetensors", {"codes": CODES, "x": np.ones(3, np.float16)})
    write_safetensors(tmp_path / "two.safetensors", {"y": np.arange(4, dtype=np.int32)})
    files = {"codes": "one.safetensors", "x": "one.safetensors", "y": "two.safetensors"}
    infos = {**read_header(tmp_path / "one.safetensors"), **read_header(tmp_path / "two.safetensors")}
    return TensorFiles(tmp_path, files, infos)


def test_a_tensor_is_read_viewed_and_streamed_from_the_file_that_holds_it(tensors):
    for name, expected in (("codes", CODES), ("y", np.arange(4, dtype=np.int32))):
        assert np.array_equal(tensors.read(name), expected)
        assert np.array_equal(tensors.view(name), expected)
        assert b"".join(tensors.chunks(name)) == expected.tobytes()


@pytest.mark.parametrize("size", [1, 1000, 1 << 18])
def test_the_extremes_do_not_depend_on_how_many_values_are_looked_at_at_a_time(tensors, size, monkeypatch):
    monkeypatch.setattr(tensor_reader, "_PASS", size)
    assert tensors.extremes("codes") == (-7, 7)
