from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_strategies import build

from quantline.checkpoints.layouts import AffineLinear, FormatError, dequantize, quantize_rtn, round_scales
from quantline.checkpoints.layouts.affine import transposed


def test_dequantize_is_code_minus_zero_times_scale_output_first() -> None:
    linear = AffineLinear(
        codes=np.array([[0, 3], [1, 2]], np.uint8),  # (in=2, out=2)
        scales=np.array([[0.5, 2.0]], np.float16),
        zeros=np.array([[1, 3]], np.int16),
        group_index=np.zeros(2, np.int32),
        bits=2,
        group_size=-1,
    )
    assert dequantize(linear).tolist() == [[-0.5, 0.0], [0.0, -2.0]]
    assert dequantize(linear).dtype == np.float32
    assert dequantize(linear, np.float16).dtype == np.float16


def test_dequantize_follows_the_group_index() -> None:
    linear = build(4, 4, 1, 2, group_index=np.array([1, 0, 0, 1], np.int32), zeros=np.array([[0], [0]], np.int16))
    linear.codes[...] = 1
    linear.scales[:, 0] = [2, 3]
    assert dequantize(linear).tolist() == [[3, 2, 2, 3]]
    assert not linear.sequential


def test_dequantize_in_blocks_equals_the_formula() -> None:
    linear = build(8, 64, 600, 32, seed=3)
    groups = linear.group_index
    expected = (linear.codes.astype(np.float64) - linear.zeros[groups]) * linear.scales[groups].astype(np.float64)
    assert np.array_equal(dequantize(linear), expected.T)  # float16 scales: float32 is exact


@pytest.mark.parametrize("shape", [(1, 1), (65, 257), (128, 512), (3, 1000)])
def test_transposed_in_tiles_is_the_transpose(shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(transposed(codes), codes.T)
    assert transposed(codes).flags.c_contiguous


def test_symmetric_means_every_zero_point_is_the_middle() -> None:
    assert build(4, 8, 8, -1, zeros=np.full((1, 8), 8, np.int16)).symmetric
    zeros = np.full((1, 8), 8, np.int16)
    zeros[0, 3] = 7
    assert not build(4, 8, 8, -1, zeros=zeros).symmetric


@pytest.mark.parametrize(
    ("parts", "fact"),
    [
        ({"codes": np.full((8, 8), 16, np.uint8)}, r"codes has values in \[16, 16\].*\[0, 15\]"),
        ({"codes": np.zeros((8, 8), np.int32)}, "uint8"),
        ({"zeros": np.full((1, 8), 16, np.int16)}, "zeros has values"),
        ({"zeros": np.full((1, 8), -1, np.int16)}, "zeros has values"),
        ({"zeros": np.zeros((2, 8), np.int16)}, "zeros is"),
        ({"scales": np.full((1, 8), np.inf, np.float16)}, "infinite or NaN"),
        ({"scales": np.ones((1, 8), np.float64)}, "float16 or float32"),
        ({"group_index": np.ones(8, np.int32)}, "group_index has values"),
        ({"bias": np.ones(7, np.float16)}, "bias is"),
    ],
)
def test_inconsistent_layers_are_refused(parts: dict[str, np.ndarray], fact: str) -> None:
    with pytest.raises(FormatError, match=fact):
        build(4, 8, 8, -1, **parts)


def test_a_group_size_that_does_not_divide_the_input_is_refused() -> None:
    with pytest.raises(FormatError, match="group_size=3 does not divide the input width 8"):
        quantize_rtn(np.ones((8, 8)), 4, 3, True)


def test_symmetric_rtn_maps_the_largest_magnitude_to_7() -> None:
    linear = quantize_rtn(np.array([[-7.0, 3.4, 0.0, 7.0]]), 4, -1, True)
    assert linear.scales.tolist() == [[1.0]]
    assert linear.zeros.tolist() == [[8]]
    assert linear.codes[:, 0].tolist() == [1, 11, 8, 15]


def test_asymmetric_rtn_range_includes_zero() -> None:
    linear = quantize_rtn(np.array([[7.5, 15.0], [-3.0, 12.0]]), 4, -1, False)
    assert linear.scales.tolist() == [[1.0, 1.0]]
    assert linear.zeros.tolist() == [[0, 3]]
    assert linear.codes.T.tolist() == [[8, 15], [0, 15]]  # 7.5 rounds to the even 8


def test_rtn_rounds_against_the_float16_scale() -> None:
    weight = np.array([[1.0, 2.1, -2.9, 0.3]], np.float32)
    linear = quantize_rtn(weight, 8, -1, True)
    stored = np.float32(linear.scales[0, 0])
    assert linear.scales.dtype == np.float16
    assert linear.codes[:, 0].tolist() == (np.rint(weight[0] / stored) + 128).tolist()


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_groups_get_scale_1_and_codes_at_the_zero_point(symmetric: bool) -> None:
    weight = np.zeros((2, 8), np.float32)
    weight[:, 4:] = 0.5
    linear = quantize_rtn(weight, 4, 4, symmetric)
    assert linear.scales[0].tolist() == [1.0, 1.0]
    assert (linear.codes[:4] == linear.zeros[0]).all()
    assert (dequantize(linear)[:, :4] == 0).all()


def test_groups_below_the_float16_range_keep_a_usable_scale() -> None:
    linear = quantize_rtn(np.full((1, 8), 1e-9), 4, -1, True)
    assert linear.scales[0, 0] > 0


def test_rtn_refuses_what_has_no_scale() -> None:
    with pytest.raises(FormatError, match="infinities or NaN"):
        quantize_rtn(np.array([[np.nan, 1.0]]), 4, -1, True)
    with pytest.raises(FormatError, match="float16 scale"):
        quantize_rtn(np.full((1, 8), 1e9), 4, -1, True)
    with pytest.raises(FormatError, match="bits=5"):
        quantize_rtn(np.ones((1, 8)), 5, -1, True)
    with pytest.raises(FormatError, match="non-empty"):
        quantize_rtn(np.ones((0, 8)), 4, -1, True)


@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([8, 16, -1]), st.booleans(), st.integers(0, 9999), st.floats(-5, 5)
)
@settings(max_examples=60, deadline=None)
def test_rtn_error_is_at_most_half_a_step(bits: int, group: int, symmetric: bool, seed: int, shift: float) -> None:
    weight = (np.random.default_rng(seed).normal(size=(3, 32)) + shift).astype(np.float32)
    kept = weight.copy()
    linear = quantize_rtn(weight, bits, group, symmetric)
    steps = linear.scales.astype(np.float32)[linear.group_index].T
    # The rounded zero point costs another half step at the ends of the range, the rounded scale a little more.
    bound = (0.5 if symmetric else 1.0) * steps * 1.01 + 2**bits * steps * 2.0**-11
    assert (np.abs(dequantize(linear) - weight) <= bound).all()
    assert np.array_equal(weight, kept)
    assert linear.symmetric or not symmetric


def test_round_scales_is_explicit_and_refuses_what_float16_cannot_reach() -> None:
    linear = build(4, 8, 8, -1, scales=np.full((1, 8), 0.1, np.float32))
    assert round_scales(linear).scales.tolist() == [[float(np.float16(0.1))] * 8]
    for value in (1e6, 1e-9):
        with pytest.raises(FormatError, match="range of float16"):
            round_scales(build(4, 8, 8, -1, scales=np.full((1, 8), value, np.float32)))


@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_grid_of_least_error_is_never_worse_in_any_group(bits: int, symmetric: bool, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_t(3, (8, 64)).astype(np.float32)
    errors = []
    for grid in ("absmax", "mse"):
        change = dequantize(quantize_rtn(weight, bits, 16, symmetric, grid=grid)) - weight
        errors.append(np.square(change).reshape(8, 4, 16).sum(axis=2))
    assert (errors[1] <= errors[0] * (1 + 1e-5) + 1e-12).all()
    if bits < 8:
        assert errors[1].sum() < errors[0].sum()


def test_the_grid_of_least_error_keeps_empty_groups() -> None:
    linear = quantize_rtn(np.zeros((4, 32), np.float32), 4, 16, True, grid="mse")
    assert (linear.scales == 1).all()
    assert not dequantize(linear).any()
