from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.compose import read_params, variant_overrides
from quantline.pipeline.params_file import add_variant, refuse_unwritable

TEXT = """# what to build
shared: model=demo   # all
baseline: method=float
variants:
  one: method=gptq bits=4   # the first
# the end
"""
LINE = ["method=gptq", "bits=4", "layers.rules=[{match: a.b, bits: 8}, {match: c, skip: true}]"]


def test_a_line_is_added_and_everything_else_stays(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(TEXT)
    add_variant(params, "two", LINE)
    assert variant_overrides(params, "two") == ["model=demo", *LINE]
    text = params.read_text()
    assert all(line in text.splitlines() for line in TEXT.splitlines())
    add_variant(params, "two", LINE)
    assert params.read_text() == text
    add_variant(params, "three", ["method=rtn"])
    assert list(read_params(params)["variants"]) == ["float", "one", "two", "three"]


def test_a_name_that_is_taken_or_not_valid_is_refused_and_nothing_written(tmp_path):
    params = tmp_path / "params.yaml"
    for text, name, words in (
        (TEXT, "one", "another line"), (TEXT, "a/b", "a/b"),
        ("shared: ''\nvariants: {one: method=rtn}\n", "two", "in braces"),
    ):  # fmt: skip
        params.write_text(text)
        with pytest.raises(UserError, match=words):
            add_variant(params, name, LINE)
        assert params.read_text() == text
        if words != "another line":  # it may be the same line, which nobody knows before the work
            with pytest.raises(UserError, match=words):
                refuse_unwritable(params, name)
    params.write_text(TEXT)
    refuse_unwritable(params, "one")
    refuse_unwritable(params, "two")
