"""Options of the conversion."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from quantline.checkpoints.layouts import TARGETS
from quantline.config.convert import ConvertConfig


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("10b", 10)])
def test_sizes(text: str, size: int) -> None:
    config = ConvertConfig(target="auto", shard_size=text)
    assert config.shard_bytes == size
    assert config.shard_size == text


@pytest.mark.parametrize("text", ["", "4", "GB", "0GB", "-1GB", "4XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="give a size such as 4GB"):
        ConvertConfig(target="auto", shard_size=text)


def test_the_identity_holds_what_was_given() -> None:
    assert ConvertConfig(target="auto", shard_size="4GB").model_dump(exclude_defaults=True) == {"target": "auto"}
    other = ConvertConfig(target="awq", shard_size="500 MB", must_serve="vllm")
    assert other.model_dump(exclude_defaults=True) == {"target": "awq", "shard_size": "500 MB", "for": "vllm"}


def test_the_targets_are_those_of_the_layouts() -> None:
    assert set(get_args(ConvertConfig.model_fields["target"].annotation)) == {"auto", "keep", *TARGETS}
