"""The weights of blocks: equal in every bit to llama.cpp's own `gguf` package."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from checkout_paths import interpreter
from hypothesis import given
from hypothesis import strategies as st

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES, dequantized

# What the library makes of rows; bit patterns, so that infinities and NaN count, too. Also what its C functions quantize.
LIBRARY = """
import sys, numpy, gguf
given = numpy.load(sys.argv[1])
found = {}
with numpy.errstate(all="ignore"):
    for name in given.files:
        kind = gguf.GGMLQuantizationType[name.split("/")[0]]
        found[name] = gguf.quants.dequantize(given[name], kind).astype(numpy.float32)
        found[f"{name}/sizes"] = numpy.array([int(kind), *gguf.GGML_QUANT_SIZES[kind]])
numpy.savez(sys.argv[2], **found)
"""


def rows_of(name: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes: every code, and scales that are tiny, huge, infinite and NaN."""
    shape = (rows, blocks * BLOCK_TYPES[name].nbytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    given = {
        f"{name}/{seed}": rows_of(name, rows, blocks, seed)
        for name in BLOCK_TYPES for seed, (rows, blocks) in enumerate([(1, 1), (7, 5), (64, 3)])
    }  # fmt: skip
    np.savez(folder / "rows.npz", **given)
    command = [interpreter("llamacpp"), "-c", LIBRARY, folder / "rows.npz", folder / "weights.npz"]
    subprocess.run(command, check=True, capture_output=True)
    return given, np.load(folder / "weights.npz")


@pytest.mark.toolchain("llamacpp")
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_block_of_any_bytes_stands_for_what_the_library_says_in_every_bit(library, name):
    given, weights = library
    kind = BLOCK_TYPES[name]
    for seed in range(3):
        key = f"{name}/{seed}"
        found, expected = dequantized(kind, given[key]), weights[key]
        assert found.dtype == np.float32
        assert found.shape == (len(given[key]), given[key].shape[1] // kind.nbytes * kind.weights)
        real = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), ~real)
        np.testing.assert_array_equal(found[real].view(np.uint32), expected[real].view(np.uint32))
        assert weights[f"{key}/sizes"].tolist() == [kind.number, kind.weights, kind.nbytes]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_cut_block_is_refused(name):
    kind = BLOCK_TYPES[name]
    with pytest.raises(FormatError, match=f"in blocks of {kind.nbytes} bytes; fetch or write the file again"):
        dequantized(kind, np.zeros((2, kind.nbytes + 1), np.uint8))
    with pytest.raises(FormatError, match="rows of it are uint8"):
        dequantized(kind, np.zeros((2, kind.nbytes), np.int8))


@given(st.sampled_from(sorted(BLOCK_TYPES)), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
def test_rows_are_read_one_by_one(name, rows, blocks, seed):
    given_rows = rows_of(name, rows, blocks, seed)
    whole = dequantized(BLOCK_TYPES[name], given_rows)
    for number, row in enumerate(given_rows):
        np.testing.assert_array_equal(whole[number : number + 1], dequantized(BLOCK_TYPES[name], row[None]))


def test_a_block_of_four_bits_by_hand():
    # The scale 0.5 as float16; the low half of byte 0 is weight 0, its high half weight 16.
    row = np.array([[0x00, 0x38, 0xF7, *[0x88] * 15]], dtype=np.uint8)
    weights = dequantized(BLOCK_TYPES["Q4_0"], row)[0]
    assert weights[0] == -0.5
    assert weights[16] == 3.5
    assert not weights[[*range(1, 16), *range(17, 32)]].any()


def test_bits_a_weight_count_the_scales():
    bits = {name: BLOCK_TYPES[name].bits_per_weight for name in ("Q8_0", "Q6_K", "Q4_K", "Q2_K", "IQ2_XXS", "IQ1_S")}
    assert bits == {"Q8_0": 8.5, "Q6_K": 6.5625, "Q4_K": 4.5, "Q2_K": 2.625, "IQ2_XXS": 2.0625, "IQ1_S": 1.5625}
