from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from quantline.toolchains.workers.quantizers.legacy_headers import said_to_be_torch


@pytest.mark.parametrize("metadata", [None, {"format": "mlx-lm"}, {"by": "another tool"}])
def test_every_header_reads_as_one_of_torch_and_tensors_as_they_are(tmp_path, metadata):
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "x.safetensors", metadata)
    ((_, name, opened),) = said_to_be_torch(SimpleNamespace(safe_open=safe_open))
    assert name == "safe_open"
    with opened(str(tmp_path / "x.safetensors"), framework="np") as file:
        assert file.metadata() == {**(metadata or {}), "format": "pt"}
        assert file.get_tensor("a")[1].tolist() == [3, 4, 5]
        assert file.get_slice("a").get_shape() == [2, 3]
    assert list(opened(str(tmp_path / "x.safetensors"), framework="np").keys()) == ["a"]
