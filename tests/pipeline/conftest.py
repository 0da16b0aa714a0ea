"""What the tests of stages without their work start from."""

from __future__ import annotations

import pytest

from quantline.pipeline.config import parse


@pytest.fixture
def checkout(root, tmp_path):
    """A folder with what fingerprints are made of."""
    for name in ("envs", "assets"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


@pytest.fixture
def config(composed):
    return lambda *overrides: parse(composed(*overrides))
