"""How a variant was chosen is kept for its line alone."""

from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.chosen import keep, kept

LINE = ["method=rtn", 'layers.rules=[{match: "a.b", bits: 8}]']


def test_what_was_kept_is_found_for_the_same_line_behind_the_shared_options(tmp_path):
    keep(tmp_path, "small", LINE, {("a.b", 4): 0.5}, group_size=64, search={"goal": "size"})
    found = kept(tmp_path, "small", "model=demo method=rtn 'layers.rules=[{match: \"a.b\", bits: 8}]'")
    assert found["units"] == [{"unit": "a.b", "bits": 4, "kl": 0.5}]
    assert found["group_size"] == 64
    assert found["search"] == {"goal": "size"}
    assert kept(tmp_path, "small", "model=demo method=rtn") == {}
    assert kept(tmp_path, "other", "method=rtn") == {}


def test_a_damaged_file_is_told_with_the_remedy(tmp_path):
    keep(tmp_path, "small", LINE, {}, group_size=64)
    path = tmp_path / "shared" / "chosen" / "small.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(UserError, match=r"small\.json: cannot be read .*; remove it"):
        kept(tmp_path, "small", "method=rtn")
