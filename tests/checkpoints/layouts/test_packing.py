from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.checkpoints.layouts import FormatError
from quantline.checkpoints.layouts.packing import pack, unpack, values_per_run


def test_eight_nibbles_go_low_bits_first() -> None:
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=np.uint8)
    assert pack(codes, 4, axis=1).view(np.uint32).tolist() == [[0x87654321]]


def test_rows_are_packed_along_axis_0() -> None:
    codes = np.array([[0x11, 0xAA], [0x22, 0xBB], [0x33, 0xCC], [0x44, 0xDD]], dtype=np.uint8)
    assert pack(codes, 8, axis=0).view(np.uint32).tolist() == [[0x44332211, 0xDDCCBBAA]]


def test_a_set_top_bit_gives_a_negative_word() -> None:
    assert pack(np.full((1, 16), 3, dtype=np.uint8), 2, axis=1).tolist() == [[-1]]


def test_three_bit_values_10_and_21_straddle_words() -> None:
    codes = np.zeros((1, 32), dtype=np.uint8)
    codes[0, 10] = 0b101  # bits 30, 31 of word 0 hold 01, bit 0 of word 1 holds 1
    codes[0, 21] = 0b110  # bit 31 of word 1 holds 0, bits 0, 1 of word 2 hold 11
    assert pack(codes, 3, axis=1).view(np.uint32).tolist() == [[1 << 30, 1, 0b11]]


def test_order_says_which_code_a_field_takes() -> None:
    codes = np.arange(8, dtype=np.uint8)[None, :]
    assert pack(codes, 4, axis=1, order=(0, 2, 4, 6, 1, 3, 5, 7)).view(np.uint32).tolist() == [[0x75316420]]


matrices = st.tuples(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 1]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**16)
)


@given(matrices)
@settings(max_examples=60, deadline=None)
def test_words_are_the_little_endian_bit_string_of_the_codes(case: tuple[int, int, int, int, int]) -> None:
    bits, axis, runs, others, seed = case
    length = runs * values_per_run(bits)
    codes = np.random.default_rng(seed).integers(0, 2**bits, (others, length)).astype(np.uint8)
    packed = pack(codes if axis == 1 else codes.T, bits, axis)
    rows = (packed if axis == 1 else packed.T).view(np.uint32)
    for row, words in zip(codes.tolist(), rows.tolist(), strict=True):
        long = sum(code << (bits * place) for place, code in enumerate(row))
        assert words == [(long >> (32 * word)) & 0xFFFFFFFF for word in range(length * bits // 32)]
    assert np.array_equal(unpack(packed, bits, axis), codes if axis == 1 else codes.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_matrices_larger_than_a_chunk_survive(bits: int, axis: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (96, 40_000)).astype(np.uint8)
    assert np.array_equal(unpack(pack(codes, bits, axis), bits, axis), codes)


def test_inputs_are_not_modified() -> None:
    codes = np.full((32, 32), 5, dtype=np.uint8)
    words = pack(codes, 3, axis=0)
    kept = words.copy()
    unpack(words, 3, axis=0)
    assert (codes == 5).all()
    assert np.array_equal(words, kept)


@pytest.mark.parametrize(
    ("codes", "bits", "fact"),
    [
        (np.full((1, 8), 16, np.uint8), 4, "code 16 does not fit 4 bits"),
        (np.zeros((1, 7), np.uint8), 4, "multiple of 8"),
        (np.zeros((1, 16), np.uint8), 3, "multiple of 32"),
        (np.zeros((1, 8), np.uint8), 5, "bits=5"),
        (np.zeros((1, 8), np.int32), 4, "uint8 matrix"),
        (np.zeros(8, np.uint8), 4, "uint8 matrix"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: np.ndarray, bits: int, fact: str) -> None:
    with pytest.raises(FormatError, match=fact):
        pack(codes, bits, axis=codes.ndim - 1)


def test_what_cannot_be_unpacked_is_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 3"):
        unpack(np.zeros((4, 2), np.int32), 3, axis=0)
    with pytest.raises(FormatError, match="int32 matrix"):
        unpack(np.zeros((4, 2), np.int64), 4, axis=0)
    with pytest.raises(FormatError, match="axis=-1"):
        unpack(np.zeros((4, 2), np.int32), 4, axis=-1)
    with pytest.raises(FormatError, match="permutation"):
        unpack(np.zeros((4, 2), np.int32), 4, axis=0, order=(0, 0, 1, 2, 3, 4, 5, 6))
