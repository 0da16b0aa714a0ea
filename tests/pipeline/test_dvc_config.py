from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.dvc_config import cache_folder, dvc_config


def test_the_cache_is_where_the_configuration_says_relative_to_it(tmp_path):
    (tmp_path / ".dvc").mkdir()
    assert cache_folder(tmp_path) == tmp_path / ".dvc" / "cache"
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    dir = ../elsewhere\n")
    assert cache_folder(tmp_path).resolve() == tmp_path / "elsewhere"


def test_the_checkout_shares_bytes_between_outputs_and_cache(root):
    assert list(dvc_config(root)["cache"]["type"]) == ["hardlink", "copy"]


def test_no_project_and_a_broken_configuration_are_told(tmp_path):
    with pytest.raises(UserError, match=r"is not a checkout with \.dvc"):
        dvc_config(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[cache")
    with pytest.raises(UserError, match="DVC cannot read it"):
        dvc_config(tmp_path)
