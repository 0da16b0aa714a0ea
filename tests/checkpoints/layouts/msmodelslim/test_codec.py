from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_strategies import build, linears

from quantline.checkpoints.layouts import AffineLinear, FormatError, dequantize
from quantline.checkpoints.layouts.msmodelslim.codec import geometry, read, read_with_outliers, write


def stored(weight: Any, scale: Any, offset: Any, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {
        "weight": np.array(weight, np.int8),
        "weight_scale": np.array(scale, dtype),
        "weight_offset": np.array(offset, dtype),
    }


def same(left: AffineLinear, right: AffineLinear) -> None:
    for name in ("codes", "scales", "zeros", "group_index", "bias"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert np.array_equal(a, b), name
    assert (left.bits, left.group_size) == (right.bits, right.group_size)


def meant(tensors: dict[str, np.ndarray], group: int) -> np.ndarray:
    """The formula itself, in float64: (weight - offset) * scale with unpacked weights."""
    scale, offset = (np.repeat(tensors[name].astype(np.float64), group, axis=1) for name in tensors if "_" in name)
    return (tensors["weight"].astype(np.float64) - offset) * scale


# The layout


@pytest.mark.parametrize(
    ("bits", "q", "u"), [(4, [-8, -1, 0, 7], [0, 7, 8, 15]), (8, [-128, -1, 0, 127], [0, 127, 128, 255])]
)
def test_codes_and_offsets_become_unsigned_by_half_the_range(bits: int, q: list[int], u: list[int]) -> None:
    linear = read(stored([q], [[0.5]], [[q[1]]]), bits=bits, group_size=-1)
    assert linear.codes[:, 0].tolist() == u
    assert linear.zeros.tolist() == [[u[1]]]
    assert dequantize(linear).tolist() == [[(code - q[1]) * 0.5 for code in q]]


def test_per_group_packing_pairs_output_rows_even_low_odd_high() -> None:
    # Byte 0x2F: row 0 is the low nibble F = -1, row 1 the high nibble 2. Byte 0x81: 1 and -8.
    tensors = stored(np.array([[0x2F, 0x81]], np.uint8).view(np.int8), [[1, 1], [1, 1]], [[0, 0], [0, 0]])
    linear = read(tensors, bits=4, group_size=1, packed=True)
    assert dequantize(linear).tolist() == [[-1, 1], [2, -8]]


def test_per_channel_packing_pairs_input_columns_even_low_odd_high() -> None:
    tensors = stored(np.array([[0x2F], [0x81]], np.uint8).view(np.int8), [[1], [1]], [[0], [0]])
    linear = read(tensors, bits=4, group_size=-1, packed=True)
    assert dequantize(linear).tolist() == [[-1, 2], [1, -8]]


def test_writing_packs_the_same_bytes() -> None:
    codes = np.array([[7, 10], [9, 0]], np.uint8)  # (in, out): q = [[-1, 2], [1, -8]]
    group = write(build(4, 2, 2, 1, codes=codes), packed=True)["weight"]
    channel = write(build(4, 2, 2, -1, codes=codes), packed=True)["weight"]
    assert group.view(np.uint8).tolist() == [[0x2F, 0x81]]
    assert channel.view(np.uint8).tolist() == [[0x1F], [0x82]]
    assert group.dtype == channel.dtype == np.int8


@given(
    linears(st.sampled_from([4, 8]), (1, 32, 64, 128, -1), reorder=False),
    st.booleans(),
    st.sampled_from(["matrix", "column", "vector"]),
)
@settings(max_examples=80, deadline=None)
def test_reads_back_what_it_wrote(linear: AffineLinear, packed: bool, shape: Any) -> None:
    packed, shape = packed and linear.bits == 4, "column" if shape == "vector" and linear.groups > 1 else shape
    tensors = write(linear, packed=packed, scale_shape=shape)
    kept = {name: array.tobytes() for name, array in tensors.items()}
    same(read(tensors, bits=linear.bits, group_size=linear.group_size, packed=packed), linear)
    again, report = read_with_outliers(tensors, bits=linear.bits, group_size=linear.group_size, packed=packed)
    same(again, linear)
    assert len(report) == 0
    assert report.largest_relative_error == 0
    assert kept == {name: array.tobytes() for name, array in tensors.items()}
    found = geometry(tensors["weight"].shape, tensors["weight_scale"].shape, packed)
    assert (found.out_features, found.in_features, found.packed) == (linear.out_features, linear.in_features, packed)
    # One group over the whole input is stored as one scale per channel; only the packing may tell them apart.
    one = linear.groups == 1 and not packed
    assert found.group_size == (-1 if one else linear.group_size)


@pytest.mark.parametrize(
    ("weight", "scale", "packed", "expected"),
    [
        ((6, 8), (6, 2), False, (6, 8, 4, False)),
        ((6, 8), (12, 1), False, (6, 8, 4, False)),
        ((6, 8), (6, 1), False, (6, 8, -1, False)),
        ((6, 8), (6,), False, (6, 8, -1, False)),
        ((3, 8), (6, 2), True, (6, 8, 4, True)),
        ((3, 8), (6, 1), True, (6, 8, 8, True)),  # one group, packed like groups
        ((3, 8), (12, 1), True, (6, 8, 4, True)),
        ((6, 4), (6, 1), True, (6, 8, -1, True)),
        ((6, 4), (6,), True, (6, 8, -1, True)),
        ((3, 8), (6, 2), False, (6, 8, 4, True)),  # several columns of scales say by themselves what is packed
        ((6, 8), (6, 2), True, (6, 8, 4, False)),
    ],
)
def test_shapes_say_widths_and_groups(weight: Any, scale: Any, packed: bool, expected: Any) -> None:
    found = geometry(weight, scale, packed)
    assert (found.out_features, found.in_features, found.group_size, found.packed) == expected


@pytest.mark.parametrize(
    ("weight", "scale"),
    [((6, 8), (5, 2)), ((6, 8), (6, 3)), ((6, 8), (7, 1)), ((6, 8), (12,)), ((6,), (6, 1)), ((6, 8), (6, 0))],
)
def test_shapes_that_do_not_fit_are_refused(weight: Any, scale: Any) -> None:
    with pytest.raises(FormatError, match="do not fit"):
        geometry(weight, scale, False)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_scales_keep_their_values_in_every_dtype(dtype: str) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    linear = read(stored([[-8, 7]], [[0.1]], [[-3]], kind), bits=4, group_size=-1)
    assert linear.scales[0, 0] == np.array(0.1).astype(kind).astype(np.float32)
    assert linear.zeros.tolist() == [[5]]
    assert linear.scales.dtype == (np.float16 if dtype == "float16" else np.float32)


def test_wrong_tensors_are_refused() -> None:
    good = stored([[1, 2], [3, 4]], [[1], [1]], [[0], [0]])
    for change, fact in [
        ({"weight": good["weight"].astype(np.float32)}, "float layer"),
        ({"weight_scale": np.ones((3, 1), np.float32)}, "weight_scale has shape"),
        ({"weight_offset": np.zeros((2, 2), np.float32)}, "weight_offset has shape"),
        ({"weight_scale": np.array([[np.inf], [np.nan]], np.float32)}, "2 scales are infinite or NaN"),
        ({"weight": np.array([[8, 0], [0, 0]], np.int8)}, r"codes are in \[0, 8\], but 4 bits allow \[-8, 7\]"),
    ]:
        with pytest.raises(FormatError, match=fact):
            read({**good, **change}, bits=4, group_size=-1)
    with pytest.raises(FormatError, match="missing: weight_offset"):
        read({name: good[name] for name in ("weight", "weight_scale")}, bits=4, group_size=-1)
    for bits, packed in ((3, False), (8, True)):
        with pytest.raises(FormatError, match=f"bits={bits}"):
            read(good, bits=bits, group_size=-1, packed=packed)


def test_writing_refuses_what_the_layout_does_not_have() -> None:
    with pytest.raises(FormatError, match="bits=3"):
        write(build(3, 32, 32, -1))
    with pytest.raises(FormatError, match="bits=8"):
        write(build(8, 32, 32, -1), packed=True)
    with pytest.raises(FormatError, match="odd"):
        write(build(4, 32, 3, 32), packed=True)
    with pytest.raises(FormatError, match="reordered"):
        write(build(4, 4, 2, 2, group_index=np.array([1, 0, 1, 0], np.int32)))
    with pytest.raises(FormatError, match="vector"):
        write(build(4, 4, 2, 2), scale_shape="vector")


# Offsets that are no codes


def test_offsets_outside_the_codes_are_refused_with_their_number() -> None:
    tensors = stored([[0] * 5] * 2, [[1] * 5] * 2, [[-35, 0, 55, 0.5, np.nan], [-8, 7, 0, 1, np.inf]])
    with pytest.raises(FormatError) as caught:
        read(tensors, bits=4, group_size=1)
    text = str(caught.value)
    assert text.startswith("5 of 10 groups have no exact zero point: 2 offsets outside [-8, 7] (from -35 to 55), ")
    assert "1 offsets that are not integral, 2 offsets that are infinite or NaN" in text
    assert "requantize_outliers" in text


def test_a_one_sided_group_is_quantized_again_and_the_others_stay() -> None:
    # Group 0 means (q + 35) * 0.1, from 2.7 to 4.2; group 1 is in order.
    weight = [[*range(-8, 8), *range(-8, 8)]]
    linear, report = read_with_outliers(stored(weight, [[0.1, 0.5]], [[-35, 3]]), bits=4, group_size=16)
    assert linear.codes[16:, 0].tolist() == list(range(16))
    assert (linear.scales[1, 0], linear.zeros[1, 0]) == (0.5, 11)
    new = float(np.float16(4.2 / 15))
    assert (linear.scales[0, 0], linear.zeros[0, 0]) == (np.float32(new), 0)
    assert (report.channels.tolist(), report.groups.tolist(), report.old_offsets.tolist()) == ([0], [0], [-35.0])
    old = (np.arange(-8, 8) + 35) * np.float64(np.float32(0.1))
    assert report.errors[0] == pytest.approx(np.abs(dequantize(linear)[0, :16] - old).max(), rel=1e-6)
    assert 0 < report.errors[0] <= new / 2 + 1e-6
    assert report.peaks[0] == pytest.approx(4.2)
    assert report.exact == 0
    record = report.records()[0]
    assert (record["channel"], record["group"], record["old_offset"], record["new_zero"]) == (0, 0, -35.0, 0)


def test_a_group_of_zeros_is_restored_exactly() -> None:
    tensors = stored([[5, 5, 1, 2]], [[0, 1]], [[np.nan, 0]])
    linear, report = read_with_outliers(tensors, bits=4, group_size=2)
    assert dequantize(linear).tolist() == [[0, 0, 1, 2]]
    assert (linear.scales[0, 0], linear.zeros[0, 0], linear.codes[0, 0]) == (1, 8, 8)
    assert (report.exact, report.errors.tolist(), report.largest_relative_error) == (1, [0], 0)
    assert report.records()[0]["old_offset"] == "nan"


def test_scale_0_with_a_sound_offset_needs_nothing() -> None:
    linear = read(stored([[5, -8]], [[0]], [[3]]), bits=4, group_size=-1)
    assert dequantize(linear).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("scale", "offset", "codes"), [(0, -np.inf, [1, 1]), (0, np.inf, [1, 1]), (1, np.nan, [1, 1]), (0, np.nan, [1, 2])]
)
def test_a_constant_whose_value_is_lost_is_refused_even_then(scale: float, offset: float, codes: list[int]) -> None:
    with pytest.raises(FormatError, match=r"1 groups have an infinite or NaN offset.*lost"):
        read_with_outliers(stored([codes], [[scale]], [[offset]]), bits=4, group_size=-1)


def test_an_offset_beside_an_integer_is_quantized_again() -> None:
    linear, report = read_with_outliers(stored([[-8, 7]], [[1]], [[0.5]]), bits=4, group_size=-1)
    assert report.old_offsets.tolist() == [0.5]
    assert np.abs(dequantize(linear) - [[-8.5, 6.5]]).max() == pytest.approx(report.errors[0])


def test_new_scales_are_float16_values_so_that_awq_holds_them() -> None:
    rng = np.random.default_rng(0)
    tensors = stored(rng.integers(-8, 8, (4, 32)), rng.random((4, 2)).astype(np.float16), np.full((4, 2), 30))
    linear, report = read_with_outliers(tensors, bits=4, group_size=16)
    assert len(report) == 8
    assert np.array_equal(linear.scales.astype(np.float16).astype(np.float32), linear.scales)


def test_more_outliers_than_fit_one_chunk_are_all_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    tensors = stored(rng.integers(-8, 8, (6, 32)), rng.random((6, 4)) + 0.1, rng.integers(20, 90, (6, 4)))
    whole, report = read_with_outliers(tensors, bits=4, group_size=8)
    monkeypatch.setattr("quantline.checkpoints.layouts.msmodelslim.outliers._CHUNK", 24)
    parts, again = read_with_outliers(tensors, bits=4, group_size=8)
    same(parts, whole)
    assert again.records() == report.records()
    assert len(again) == 24


@given(st.sampled_from([4, 8]), st.sampled_from([1, 4, 8, -1]), st.integers(0, 9999), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_only_reported_groups_change_and_by_the_reported_error(bits: int, group: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    middle, groups = 2 ** (bits - 1), 1 if group == -1 else 16 // group
    weight = rng.integers(-middle, middle, (6, 16))
    offset = rng.integers(-middle, middle, (6, groups)).astype(np.float32)
    wild = rng.random((6, groups)) < share
    offset[wild] = rng.choice([-1, 1], int(wild.sum())) * rng.integers(middle + 1, 1000, int(wild.sum()))
    tensors = stored(weight, rng.random((6, groups)) + 0.01, offset)
    linear, report = read_with_outliers(tensors, bits=bits, group_size=group)
    width = 16 // groups
    old = meant(tensors, width)
    difference = np.abs(dequantize(linear).astype(np.float64) - old).reshape(6, groups, width).max(axis=2)
    expected = np.zeros((6, groups))
    expected[report.channels, report.groups] = report.errors
    assert sorted(zip(report.channels, report.groups, strict=True)) == sorted(zip(*np.nonzero(wild), strict=True))
    assert np.allclose(difference, expected, rtol=1e-5, atol=1e-5 * np.abs(old).max())
    assert (difference[~wild] <= 1e-6 * np.abs(old).max()).all()
    assert (report.errors <= report.new_scales * 1.01 + 1e-6).all()  # half a step for the code, half for the zero point
