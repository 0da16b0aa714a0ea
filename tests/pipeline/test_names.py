"""Names of variants, alone and with their model."""

from __future__ import annotations

import pytest

from quantline.pipeline.names import all_names, baseline_of, dvc_stage, is_baseline_name, joined, model_of, own_name

CONTENT = {"models": {"qwen": "", "demo": ""}, "variants": {"one": "", "two": ""}}


@pytest.mark.parametrize(("name", "model", "own"), [("one", "", "one"), ("qwen/one", "qwen", "one")])
def test_a_name_comes_apart_into_model_and_variant_and_together_again(name, model, own):
    assert (model_of(name), own_name(name)) == (model, own)
    assert joined(model, own) == name


def test_each_model_has_a_float_baseline_of_its_own():
    assert [baseline_of(name) for name in ("one", "qwen/one")] == ["float", "qwen/float"]
    assert [is_baseline_name(name) for name in ("float", "qwen/float", "qwen/one")] == [True, True, False]


def test_every_model_has_every_variant():
    assert all_names(CONTENT) == ["qwen/float", "qwen/one", "qwen/two", "demo/float", "demo/one", "demo/two"]
    assert all_names({"variants": CONTENT["variants"]}) == ["float", "one", "two"]


def test_only_named_pairs_are_built_where_they_are_named():
    found = all_names({**CONTENT, "pairs": ["demo/two", "qwen/one"]})
    assert found == ["qwen/float", "qwen/one", "demo/float", "demo/two"]


@pytest.mark.parametrize(
    ("stage", "name", "shared", "called"),
    [
        ("quantize", "one", False, "quantize@one"), ("quantize", "qwen/one", False, "quantize@qwen-one"),
        ("evaluate", "float", False, "evaluate_baseline"), ("evaluate", "qwen/float", False, "evaluate_baseline@qwen"),
        ("download", "one", True, "download"), ("download", "qwen/one", True, "download@qwen"),
    ],
)  # fmt: skip
def test_dvcs_names_of_stages(stage, name, shared, called):
    assert dvc_stage(stage, name, shared=shared) == called
