from __future__ import annotations

import warnings

import numpy as np
import pytest

from quantline.checkpoints.layouts.half import all_finite, narrowed, widened

EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)
POSITIVE_NORMAL = EVERY_HALF[0x400:0x7C00]


def test_every_half_widens_as_numpy_widens_it() -> None:
    for halves in (EVERY_HALF, POSITIVE_NORMAL):
        assert np.array_equal(widened(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))


def around(values: np.ndarray) -> np.ndarray:
    """Positive float32 values with their neighbours on both sides."""
    bits = values.view(np.uint32)
    return np.concatenate([bits - 1, bits, bits + 1]).view(np.float32)


def test_values_at_between_and_beside_halves_narrow_as_numpy_narrows_them() -> None:
    exact = POSITIVE_NORMAL.astype(np.float32)
    middles = (exact[1:] + exact[:-1]) / np.float32(2)  # ties
    for values in (exact, around(middles), around(exact[1:])):
        assert np.array_equal(narrowed(values).view(np.uint16), values.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize(
    "value", [0.0, -0.0, -1.5, 1e-9, 2.0**-14, 2.0**-15, 2.0**-24, 65504.0, 65519.99, 65520.0, 1e9, np.inf, np.nan]
)
def test_what_is_not_positive_and_normal_narrows_as_numpy_narrows_it_and_silently(value: float) -> None:
    values = np.array([1.25, value, 3.0], dtype=np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(narrowed(values).view(np.uint16), expected.view(np.uint16))


def test_matrices_keep_their_shape_whatever_their_order_in_memory() -> None:
    values = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    for matrix in (values, values.T, values[:, ::2]):
        assert np.array_equal(narrowed(matrix), matrix.astype(np.float16))
        assert np.array_equal(widened(narrowed(matrix)), matrix.astype(np.float16).astype(np.float32))
    assert narrowed(np.zeros((0, 3), np.float32)).shape == (0, 3)


def test_wide_values_stay_as_they_are() -> None:
    values = np.ones(3, dtype=np.float32)
    assert widened(values) is values


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_found(dtype: type, value: float) -> None:
    values = np.linspace(-1, 1, 10).astype(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    values[7] = value
    assert not all_finite(values)


def test_every_finite_half_is_finite() -> None:
    assert all_finite(EVERY_HALF[np.isfinite(EVERY_HALF)])
