"""The header of a GGUF file: what is read, and that a damaged one is refused at every byte."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from gguf_files import gguf_bytes, random_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.core.errors import CheckpointError

SETTINGS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.eps": 0.5,
    "tokenizer.ggml.tokens": ["a", "bc"],
}
TENSORS = {
    "a.weight": random_rows("Q4_K", 3, 512), "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "c.bias": np.arange(5, dtype=np.float16),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(data: bytes):
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return path

    return write


def test_settings_and_tensors_are_where_the_file_has_them(file):
    path = file(gguf_bytes(SETTINGS, TENSORS))
    header = read_gguf(path)
    assert header.architecture == "llama"
    assert (header.number("block_count"), header.number("absent", 7)) == (2, 7)
    assert header.settings["tokenizer.ggml.tokens"] == "2 values"
    assert {name: one.shape for name, one in header.tensors.items()} == {
        "a.weight": (3, 512), "b.weight": (2, 3), "c.bias": (5,)
    }  # fmt: skip
    blocks = header.tensors["a.weight"]
    assert (blocks.kind.name, blocks.nbytes) == ("Q4_K", 3 * 2 * 144)
    whole = path.read_bytes()
    assert whole[blocks.offset : blocks.offset + blocks.nbytes] == TENSORS["a.weight"][1].tobytes()
    last = header.tensors["c.bias"]
    assert whole[last.offset : last.offset + last.nbytes] == TENSORS["c.bias"].tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(gguf_bytes(SETTINGS, TENSORS)) - 33))
def test_a_file_that_ends_anywhere_is_refused(file, length):
    # Up to the padding behind the last tensor.
    with pytest.raises(CheckpointError):
        read_gguf(file(gguf_bytes(SETTINGS, TENSORS)[:length]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 250), st.integers(0, 255))
def test_a_damaged_byte_of_the_header_is_refused_or_read(file, place, value):
    data = bytearray(gguf_bytes(SETTINGS, TENSORS))
    data[place] = value
    with suppress(CheckpointError):  # and nothing else
        assert read_gguf(file(bytes(data))).path.name == "x.gguf"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), "is no GGUF file; fetch it again, or give a folder of safetensors"),
        (gguf_bytes(SETTINGS, TENSORS, version=1), "GGUF of version 1 in little-endian: 2 and 3 can be read"),
        (gguf_bytes({**SETTINGS, "split.count": 3}, TENSORS), "is one of 3 parts; join them with llama-gguf-split"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_remedy(file, data, message):
    with pytest.raises(CheckpointError, match=message):
        read_gguf(file(data))


def test_a_type_that_is_not_known_is_refused_by_its_number(file):
    data = gguf_bytes(SETTINGS, {"b.weight": TENSORS["b.weight"]})
    place = data.index(b"b.weight") + len("b.weight") + 4 + 2 * 8
    with pytest.raises(CheckpointError, match=r"tensor b.weight has the type 99, which is not known"):
        read_gguf(file(data[:place] + (99).to_bytes(4, "little") + data[place + 4 :]))


def test_rows_that_are_no_whole_blocks_are_refused(file):
    data = gguf_bytes(SETTINGS, {"a.weight": TENSORS["a.weight"]})
    place = data.index(b"a.weight") + len("a.weight") + 4
    with pytest.raises(CheckpointError, match=r"a.weight of Q4_K has rows of 500, no multiple of 256"):
        read_gguf(file(data[:place] + (500).to_bytes(8, "little") + data[place + 8 :]))
