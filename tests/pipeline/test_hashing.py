import hashlib

import numpy as np
import pytest

from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.core.errors import CheckpointError
from quantline.pipeline.hashing import hash_folder, tensor_hashes

A = np.array([[1, 2], [3, 4]], np.int32)


def test_a_tensors_hash_is_over_its_dtype_its_shape_and_its_bytes(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": A})
    expected = hashlib.sha256(b'["I32", [2, 2]]' + A.tobytes()).hexdigest()
    assert tensor_hashes(tmp_path / "x.safetensors") == {"a": expected}


def test_a_tensor_is_the_same_whatever_file_it_stands_in(tmp_path):
    write_safetensors(tmp_path / "one.safetensors", {"a": A, "b": A.astype(np.float64)}, {"k": "v"})
    write_safetensors(tmp_path / "other.safetensors", {"a": A})
    one, other = (tensor_hashes(tmp_path / name) for name in ("one.safetensors", "other.safetensors"))
    assert one["a"] == other["a"] != one["b"]
    write_safetensors(tmp_path / "other.safetensors", {"a": A + 1})
    assert tensor_hashes(tmp_path / "other.safetensors")["a"] != one["a"]


def test_shape_and_dtype_tell_equal_bytes_apart(tmp_path):
    shapes = {"a": A, "flat": A.reshape(4), "unsigned": A.astype(np.uint32)}
    write_safetensors(tmp_path / "x.safetensors", {**shapes, "empty": A[:0], "empty_too": A[:, :0]})
    assert len(set(tensor_hashes(tmp_path / "x.safetensors").values())) == 5


def test_every_file_and_every_tensor_of_a_folder_is_known_and_names_that_occur_twice_are_told_by_their_file(tmp_path):
    (tmp_path / "inner").mkdir()
    write_safetensors(tmp_path / "inner" / "model.safetensors", {"a": A, "b": A})
    write_safetensors(tmp_path / "probe.safetensors", {"a": A})
    (tmp_path / "config.json").write_text("{}")
    found = hash_folder(tmp_path)
    assert list(found.files) == ["config.json", "inner/model.safetensors", "probe.safetensors"]
    assert found.files["config.json"] == hashlib.sha256(b"{}").hexdigest()
    assert set(found.tensors) == {"inner/model.safetensors:a", "b", "probe.safetensors:a"}


def test_only_empty_tensors_are_hashed_too(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": A[:0]})
    assert list(hash_folder(tmp_path).tensors) == ["a"]


def test_a_file_that_is_called_safetensors_and_is_none_is_an_error(tmp_path):
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(CheckpointError):
        hash_folder(tmp_path)
