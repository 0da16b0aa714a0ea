from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.finite import nonfinite
from quantline.checkpoints.safetensors_file import CHUNK

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_value_that_is_no_number_is_found(tmp_path, dtype, value):
    if dtype == "F8_E4M3" and np.isinf(value):
        pytest.skip("has no infinity")
    array = np.ones((3, 5), np.float32).astype(DTYPES[dtype])
    array[2, 1] = value
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(7, np.float32), "b": array})
    assert nonfinite(tmp_path) == {"b": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_a_dtype_passes_whatever_its_sign_and_size(tmp_path, dtype):
    limits = ml_dtypes.finfo(DTYPES[dtype])
    ends = [limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0, limits.smallest_subnormal]
    array = np.array(ends).astype(DTYPES[dtype])
    write_safetensors(tmp_path / "model.safetensors", {"a": array, "none": array[:0], "scalar": array[0].reshape(())})
    assert nonfinite(tmp_path) == {}
    if array.dtype.itemsize <= 2:  # all of them
        every = np.arange(1 << (8 * array.dtype.itemsize)).astype(f"u{array.dtype.itemsize}").view(array.dtype)
        expected = int(np.count_nonzero(~np.isfinite(every.astype(np.float32))))
        write_safetensors(tmp_path / "model.safetensors", {"every": every})
        assert nonfinite(tmp_path) == {"every": expected}


def test_values_are_counted_over_the_chunks_of_a_large_tensor_and_integers_are_none(tmp_path):
    array = np.zeros(CHUNK // 4 * 2 + 3, np.float32)
    array[[0, CHUNK // 4, -1]] = np.nan
    codes = np.full(64, -1, np.int32)  # the bits of a NaN
    write_safetensors(tmp_path / "model.safetensors", {"large": array, "codes": codes, "bits": codes.view(np.uint32)})
    assert nonfinite(tmp_path) == {"large": 3}
