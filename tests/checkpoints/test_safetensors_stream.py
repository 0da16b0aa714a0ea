from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import CHUNK, SafetensorsFile, read_header
from quantline.checkpoints.safetensors_stream import StreamedFile, TensorSpec, flushed, streamed
from quantline.core.errors import CheckpointError

SPECS = {
    "a.weight": TensorSpec("F16", (3, 5)),
    "b.qweight": TensorSpec("I32", (4, 2)),
    "c.flags": TensorSpec("U8", (7,)),
    "d.scalar": TensorSpec("F32", ()),
}


def tensors() -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(0)
    return {
        "a.weight": random.normal(size=(3, 5)).astype(np.float16),
        "b.qweight": random.integers(-(2**31), 2**31, (4, 2)).astype(np.int32),
        "c.flags": np.arange(7, dtype=np.uint8),
        "d.scalar": np.array(1.5, dtype=np.float32),
    }


def write(path: Path, names: list[str]) -> bytes:
    with streamed(path, SPECS) as file:
        for name in names:
            file.put(name, tensors()[name])
    return path.read_bytes()


def test_the_order_in_which_tensors_come_does_not_matter_for_the_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "one", list(SPECS)) == write(tmp_path / "other", list(SPECS)[::-1])


def test_the_order_in_which_tensors_are_announced_does_not_matter_for_the_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one", list(SPECS))
    with streamed(tmp_path / "other", dict(reversed(SPECS.items()))) as file:
        for name, array in tensors().items():
            file.put(name, array)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_what_was_put_is_what_safetensors_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    write(tmp_path / "file", list(SPECS))
    found = safetensors.load_file(tmp_path / "file")
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in tensors().items()
    }


def test_every_tensor_lies_at_a_multiple_of_its_items(tmp_path: Path) -> None:
    write(tmp_path / "file", list(SPECS))
    assert all(info.offset % SPECS[name].itemsize == 0 for name, info in read_header(tmp_path / "file").items())


def test_arrays_by_columns_are_written_by_rows(tmp_path: Path) -> None:
    array = np.arange(8, dtype=np.int32).reshape(2, 4)
    with streamed(tmp_path / "file", {"w": TensorSpec("I32", (4, 2))}) as file:
        file.put("w", array.T)
        assert np.array_equal(file.get("w"), array.T)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.weight", np.zeros((3, 5), np.float32)),
        ("a.weight", np.zeros((5, 3), np.float16)),
        ("a.weight", np.zeros(15, np.float16)),
        ("unknown", np.zeros((3, 5), np.float16)),
    ],
)
def test_another_dtype_shape_or_name_than_announced_is_refused(
    tmp_path: Path, name: str, array: NDArray[np.generic]
) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is"), streamed(tmp_path / "file", SPECS) as file:
        file.put(name, array)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"b\.qweight is written twice"):
        write(tmp_path / "file", ["a.weight", "b.qweight", "b.qweight"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", SPECS)
def test_a_tensor_that_does_not_come_leaves_no_file(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CheckpointError, match=f"{missing} was planned but not written"):
        write(tmp_path / "file", [name for name in SPECS if name != missing])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_exception_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    def some(path: Path) -> None:
        with streamed(path, SPECS) as file:
            file.put("a.weight", tensors()["a.weight"])
            raise error

    with pytest.raises(error):
        some(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_file_that_was_there_before(tmp_path: Path) -> None:
    before = write(tmp_path / "file", list(SPECS))
    with pytest.raises(KeyboardInterrupt), streamed(tmp_path / "file", SPECS):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == before


def test_the_name_appears_when_the_file_is_whole(tmp_path: Path) -> None:
    with streamed(tmp_path / "file", SPECS) as file:
        for name, array in tensors().items():
            file.put(name, array)
            assert not (tmp_path / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_has_come_is_read_back_from_the_file_while_others_are_to_come(tmp_path: Path) -> None:
    with streamed(tmp_path / "file", SPECS) as file:
        for name, array in tensors().items():
            file.put(name, array)
            again = file.get(name)
            assert again.dtype == array.dtype
            assert again.shape == array.shape
            assert again.tobytes() == array.tobytes()


def test_reading_gives_what_the_file_holds_now_and_not_what_was_put(tmp_path: Path) -> None:
    with streamed(tmp_path / "file", SPECS) as file:
        for name, array in tensors().items():
            file.put(name, array)
        with file.path.open("r+b") as other:
            other.seek(file.infos["c.flags"].offset)
            other.write(b"\xff")
        assert file.get("c.flags").tolist() == [255, 1, 2, 3, 4, 5, 6]


def large(file: StreamedFile, name: str) -> Iterator[bytes]:
    size = file.infos[name].nbytes
    yield from (bytes([index]) * min(CHUNK, size - start) for index, start in enumerate(range(0, size, CHUNK)))


def test_a_tensor_comes_and_goes_in_pieces(tmp_path: Path) -> None:
    size = 2 * CHUNK + 3
    with streamed(tmp_path / "file", {"w": TensorSpec("U8", (size,))}) as file:
        file.put_chunks("w", "U8", (size,), large(file, "w"))
        assert list(file.chunks("w")) == list(large(file, "w"))
    file = SafetensorsFile.open(tmp_path / "file")
    assert b"".join(file.chunks("w")) == b"".join(large(file, "w"))


@pytest.mark.parametrize("pieces", [[b"123"], [b"12345678"], []])
def test_pieces_that_do_not_add_up_to_the_tensor_are_refused(tmp_path: Path, pieces: list[bytes]) -> None:
    specs = {"v": TensorSpec("U8", (5,)), "w": TensorSpec("U8", (9,))}
    with pytest.raises(CheckpointError, match="v has"), streamed(tmp_path / "file", specs) as file:
        file.put_chunks("v", "U8", (5,), iter(pieces))
    assert list(tmp_path.iterdir()) == []


def test_a_thread_flushes_while_tensors_come(tmp_path: Path) -> None:
    with streamed(tmp_path / "file", SPECS) as file, flushed(file) as news:
        for name, array in tensors().items():
            file.put(name, array)
            news.set()
    assert (tmp_path / "file").read_bytes() == write(tmp_path / "other", list(SPECS))


def test_what_the_disk_says_to_the_thread_is_not_lost(tmp_path: Path) -> None:
    def flush(descriptor: int) -> None:
        with flushed(StreamedFile(tmp_path / "file", descriptor, {})) as news:
            news.set()
            while news.is_set():
                time.sleep(0.001)

    pipe = os.pipe()  # cannot be flushed, as a disk that fails cannot
    with pytest.raises(OSError, match="Invalid argument"):
        flush(pipe[1])
    for end in pipe:
        os.close(end)


def test_the_header_is_that_of_safetensors(tmp_path: Path) -> None:
    data = write(tmp_path / "file", list(SPECS))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in SPECS.items()
    }
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0
    assert all(one[1] == following[0] for one, following in pairwise(ends))
    assert ends[-1][1] == len(data) - 8 - size
