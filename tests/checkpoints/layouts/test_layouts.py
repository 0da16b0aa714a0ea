from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_strategies import build, linears

from quantline.checkpoints.layouts import (
    LAYOUTS,
    AffineLinear,
    FormatError,
    awq_gemm,
    awq_gemv,
    gptq,
    gptq_v2,
    quantize_rtn,
)


def words(array: np.ndarray) -> list[list[int]]:
    return array.view(np.uint32).tolist()


def assert_equal(left: AffineLinear, right: AffineLinear) -> None:
    assert (left.bits, left.group_size) == (right.bits, right.group_size)
    for name in ("codes", "scales", "zeros", "group_index", "bias"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert np.array_equal(a, b), name


def check_round_trip(layout: str, linear: AffineLinear) -> None:
    module = LAYOUTS[layout]
    kept = [array.copy() for array in (linear.codes, linear.scales, linear.zeros, linear.group_index)]
    tensors = module.write(linear)
    assert set(tensors) <= set(module.tensors)
    before = {suffix: array.tobytes() for suffix, array in tensors.items()}
    assert_equal(module.read(tensors, bits=linear.bits, group_size=linear.group_size), linear)
    assert before == {suffix: array.tobytes() for suffix, array in tensors.items()}
    now = (linear.codes, linear.scales, linear.zeros, linear.group_index)
    assert all(np.array_equal(a, b) for a, b in zip(kept, now, strict=True))


def test_every_layout_is_registered_under_its_name() -> None:
    assert [layout.name for layout in LAYOUTS.values()] == list(LAYOUTS)
    # Each is described in config.json, or by a file of its own.
    assert all((layout.config is None) != (layout.folder is None) for layout in LAYOUTS.values())


@given(linears(st.just(4), (16, 32, 64, 128, -1), reorder=False))
@settings(max_examples=40, deadline=None)
def test_awq_gemm_reads_back_what_it_wrote(linear: AffineLinear) -> None:
    check_round_trip("awq_gemm", linear)


@given(linears(st.just(4), (32, 64, 128, -1), reorder=False))
@settings(max_examples=40, deadline=None)
def test_awq_gemv_reads_back_what_it_wrote(linear: AffineLinear) -> None:
    check_round_trip("awq_gemv", linear)


@given(st.sampled_from(["gptq", "gptq_v2"]), linears(st.sampled_from([2, 3, 4, 8]), (16, 32, 128, -1), reorder=True))
@settings(max_examples=80, deadline=None)
def test_gptq_reads_back_what_it_wrote(layout: str, linear: AffineLinear) -> None:
    check_round_trip(layout, linear)


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.affine is not None])
def test_the_smallest_layer_with_one_group_of_equal_codes_survives(layout: str) -> None:
    bits = 8 if layout == "compressed_tensors_int" else 4
    linear = quantize_rtn(np.full((8, 32), 0.25, np.float32), bits, -1, True)
    check_round_trip(layout, linear)


# AWQ


def test_awq_nibble_order_is_0_2_4_6_1_3_5_7() -> None:
    row = np.arange(1, 9, dtype=np.uint8)[None, :].repeat(8, axis=0)  # column c holds c + 1
    zeros = np.arange(8, 0, -1, dtype=np.int16)[None, :]
    tensors = awq_gemm.write(build(4, 8, 8, -1, codes=row, zeros=zeros))
    assert words(tensors["qweight"]) == [[0x86427531]] * 8
    assert words(tensors["qzeros"]) == [[0x13572468]]
    assert tensors["qweight"].dtype == np.int32
    assert tensors["qweight"].shape == (8, 1)


def test_awq_gemv_is_sequential_along_in_and_output_first() -> None:
    codes = np.zeros((128, 8), np.uint8)
    codes[:8, 1] = np.arange(1, 9)
    tensors = awq_gemv.write(build(4, 128, 8, 128, codes=codes, zeros=np.full((1, 8), 9, np.int16)))
    assert tensors["qweight"].shape == (8, 16)
    assert words(tensors["qweight"])[1] == [0x87654321] + [0] * 15
    assert words(tensors["qzeros"]) == [[9]] * 8
    assert tensors["scales"].shape == (8, 8)
    assert not tensors["scales"][:, 1:].any()


@pytest.mark.parametrize(
    ("in_features", "group_size", "width"),
    [
        (128, 128, 1),
        (2048, 128, 2),
        (2176, 128, 3),
        (128, 64, 2),
        (1088, 64, 4),
        (64, 32, 4),
        (1056, 32, 8),
        (640, -1, 1),
    ],
)
def test_awq_gemv_pads_zero_points_to_1_2_4_words(in_features: int, group_size: int, width: int) -> None:
    assert awq_gemv.zeros_width(in_features, group_size) == width


def test_awq_gemv_padding_in_use_means_a_wrong_group_size() -> None:
    tensors = awq_gemv.write(build(4, 256, 8, 128))
    with pytest.raises(FormatError, match="padding after 1 groups"):
        awq_gemv.read(tensors, bits=4, group_size=256)


@pytest.mark.parametrize("layout", [awq_gemm, awq_gemv])
def test_awq_refuses_what_it_cannot_hold(layout: object) -> None:
    write = layout.write  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match="bits=8: AWQ layouts store 4 bits only"):
        write(build(8, 128, 32, 128))
    with pytest.raises(FormatError, match="reordered by activation"):
        write(build(4, 64, 32, 32, group_index=np.arange(64, dtype=np.int32) % 2))
    with pytest.raises(FormatError, match="out_features=12 is not a multiple of 8"):
        write(build(4, 128, 12, 128))
    with pytest.raises(FormatError, match="in_features=132 is not a multiple of 8"):
        write(build(4, 132, 32, -1))
    with pytest.raises(FormatError, match="scales has values that float16 cannot"):
        write(build(4, 128, 32, 128, scales=np.full((1, 32), 0.1, np.float32)))
    with pytest.raises(FormatError, match="bits=3"):
        layout.read(write(build(4, 128, 32, 128)), bits=3, group_size=128)  # type: ignore[attr-defined]


def test_awq_writes_float32_scales_that_are_float16_values() -> None:
    tensors = awq_gemm.write(build(4, 128, 32, 128, scales=np.full((1, 32), 0.25, np.float32)))
    assert tensors["scales"].dtype == np.float16


def test_awq_gemv_refuses_group_sizes_without_a_padding_rule() -> None:
    with pytest.raises(FormatError, match="group size 16"):
        awq_gemv.write(build(4, 128, 32, 16))


# GPTQ


def test_gptq_packs_rows_low_bits_first() -> None:
    codes = np.zeros((8, 8), np.uint8)
    codes[:, 2] = np.arange(1, 9)
    tensors = gptq.write(build(4, 8, 8, -1, codes=codes))
    assert words(tensors["qweight"]) == [[0, 0, 0x87654321, 0, 0, 0, 0, 0]]


def test_gptq_v1_stores_zero_minus_one() -> None:
    linear = build(4, 8, 8, -1, zeros=np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.int16))
    assert words(gptq.write(linear)["qzeros"]) == [[0x76543210]]
    assert words(gptq_v2.write(linear)["qzeros"]) == [[0x87654321]]


def test_gptq_v1_zero_point_0_is_all_ones_and_spares_its_neighbours() -> None:
    linear = build(4, 8, 8, -1, zeros=np.array([[1, 0, 3, 4, 5, 6, 7, 8]], np.int16))
    tensors = gptq.write(linear)
    assert words(tensors["qzeros"]) == [[0x765432F0]]
    assert gptq.read(tensors, bits=4, group_size=-1).zeros.tolist() == linear.zeros.tolist()


@pytest.mark.parametrize(("bits", "step"), [(4, 0x11111111), (8, 0x01010101)])
def test_gptq_v1_to_v2_adds_one_to_every_field(bits: int, step: int) -> None:
    zeros = np.random.default_rng(0).integers(1, 2**bits, (2, 32)).astype(np.int16)
    linear = build(bits, 64, 32, 32, zeros=zeros)
    difference = gptq_v2.write(linear)["qzeros"].view(np.uint32) - gptq.write(linear)["qzeros"].view(np.uint32)
    assert (difference == step).all()


def test_gptq_symmetric_4_bit_zeros_are_0x77777777() -> None:
    tensors = gptq.write(quantize_rtn(np.ones((8, 64), np.float32), 4, 32, True))
    assert words(tensors["qzeros"]) == [[0x77777777]] * 2


def test_gptq_writes_the_group_of_every_column() -> None:
    assert gptq.write(build(4, 64, 8, 32))["g_idx"].tolist() == [0] * 32 + [1] * 32
    assert gptq.write(build(4, 64, 8, -1))["g_idx"].tolist() == [0] * 64


def test_gptq_without_g_idx_has_consecutive_groups() -> None:
    tensors = gptq.write(build(4, 64, 8, 32))
    del tensors["g_idx"]
    assert gptq.read(tensors, bits=4, group_size=32).sequential


def test_gptq_keeps_the_dtype_of_its_scales() -> None:
    linear = build(4, 64, 8, 32, scales=np.full((2, 8), 0.1, np.float32))
    assert gptq.read(gptq.write(linear), bits=4, group_size=32).scales.dtype == np.float32


def test_bfloat16_scales_are_widened_exactly() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = gptq.write(build(4, 64, 8, 32))
    tensors["scales"] = np.full((2, 8), 0.1).astype(ml_dtypes.bfloat16)
    read = gptq.read(tensors, bits=4, group_size=32).scales
    assert read.dtype == np.float32
    assert (read == np.float32(0.10009765625)).all()


@pytest.mark.parametrize(("bits", "multiple"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_gptq_refuses_widths_that_do_not_fill_words(bits: int, multiple: int) -> None:
    with pytest.raises(FormatError, match=f"in_features={multiple + 1}.*multiple of {multiple}"):
        gptq.write(build(bits, multiple + 1, 32, -1))
    with pytest.raises(FormatError, match=f"out_features={multiple + 1}.*multiple of {multiple}"):
        gptq.write(build(bits, 32, multiple + 1, -1))


def test_missing_unknown_and_misshapen_tensors_are_refused() -> None:
    tensors = gptq.write(build(4, 64, 8, 32))
    with pytest.raises(FormatError, match="missing: qzeros, scales"):
        gptq.read({"qweight": tensors["qweight"]}, bits=4, group_size=32)
    with pytest.raises(FormatError, match="does not have: weight_shape"):
        gptq.read({**tensors, "weight_shape": np.zeros(2)}, bits=4, group_size=32)
    with pytest.raises(FormatError, match="qzeros has shape"):
        gptq.read(tensors, bits=4, group_size=64)
    with pytest.raises(FormatError, match="scales is int32"):
        gptq.read({**tensors, "scales": np.zeros((2, 8), np.int32)}, bits=4, group_size=32)
    with pytest.raises(FormatError, match="g_idx is float32"):
        gptq.read({**tensors, "g_idx": np.zeros(64, np.float32)}, bits=4, group_size=32)
    with pytest.raises(FormatError, match="group_index has values"):
        gptq.read({**tensors, "g_idx": np.full(64, 2, np.int32)}, bits=4, group_size=32)
