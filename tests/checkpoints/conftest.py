"""A fixture for tests of dtypes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from quantline.checkpoints.safetensors_file import numpy_dtype, safetensors_dtype


@pytest.fixture(params=["with ml_dtypes", "without"])
def ml_dtypes_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    present = bool(request.param == "with ml_dtypes")
    if present:
        pytest.importorskip("ml_dtypes")
    else:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    numpy_dtype.cache_clear()
    safetensors_dtype.cache_clear()
    yield present
    numpy_dtype.cache_clear()
    safetensors_dtype.cache_clear()
