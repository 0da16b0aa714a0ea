"""The block `models:` of params.yaml, and what contradicts it."""

from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.compose import read_params, variant_overrides

PARAMS = """
shared: calibration=demo
baseline: method=float
models:
  demo: model=demo
  mine: model=custom model.path=local/mine calibration=auto
variants:
  w8: method=rtn bits=8
  w4: method=rtn bits=4
"""


@pytest.fixture
def params(tmp_path):
    def write(text=PARAMS, **exchanged):
        path = tmp_path / "params.yaml"
        for before, after in exchanged.get("of", {}).items():
            assert before in text
            text = text.replace(before, after)
        path.write_text(text)
        return path

    return write


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_params(path)
    return str(caught.value)


def test_a_pair_has_the_shared_line_its_models_and_its_own(params):
    assert list(read_params(params())["variants"]) == [
        "demo/float", "demo/w8", "demo/w4", "mine/float", "mine/w8", "mine/w4",
    ]  # fmt: skip
    assert variant_overrides(params(), "mine/w4") == [
        "calibration=demo", "model=custom", "model.path=local/mine", "calibration=auto", "method=rtn", "bits=4",
    ]  # fmt: skip
    assert variant_overrides(params(), "mine/float")[-2:] == ["calibration=auto", "method=float"]


def test_the_lines_of_the_variants_are_kept_as_they_stand_in_the_file(params):
    assert read_params(params())["own"] == {"w8": "method=rtn bits=8", "w4": "method=rtn bits=4"}


def test_one_model_is_as_it_was(params):
    text = "shared: model=demo\nbaseline: method=float\nvariants:\n  w8: method=rtn bits=8\n"
    assert read_params(params(text))["variants"] == {"float": "method=float", "w8": "method=rtn bits=8"}


def test_only_the_pairs_that_are_named(params):
    path = params(PARAMS + "pairs: [mine/w4, demo/w8]\n")
    assert list(read_params(path)["variants"]) == ["demo/float", "demo/w8", "mine/float", "mine/w4"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("bits=4", "bits=4 model=demo", "variants.w4: model=demo sets the model, which the lines of `models:` do"),
        ("bits=4", "bits=4 model.path=x", "variants.w4: model.path=x sets the model"),
        ("method=float", "method=float model=demo", "baseline: model=demo sets the model"),
        ("demo: model=demo", "w4: model=demo", "models.w4: a variant has this name, too"),
        ("demo: model=demo", "shared: model=demo", "models.shared: a model cannot be called shared"),
        ("demo: model=demo", "float: model=demo", "models.float: a model cannot be called float"),
        ("demo: model=demo", "by-hand: model=demo", "models.by-hand: is the name of something else"),
        ("demo: model=demo", "tasks: model=demo", "models.tasks: is the name of something else"),
        ("demo: model=demo", "a.b: model=demo", "models.a.b: a model's name takes letters"),
        ("demo: model=demo", "demo: calibration=demo", "models.demo: sets no model; write which it is"),
        ("demo: model=demo", "demo: model=demo method=rtn", "models.demo: method=rtn describes a variant"),
        ("demo: model=demo", "demo: 3", "models.demo is 3; give overrides as one line of text"),
        ("  w4:", "  tasks:", "variants.tasks: is the name of a stage"),
        ("demo: model=demo\n  mine:", "demo: model=demo\n  demo-w8:", "" ),
    ],
)  # fmt: skip
def test_what_contradicts_the_models_is_refused_with_the_place(params, before, after, said):
    path = params(of={before: after})
    if said:
        assert said in refusal(path)
    else:
        assert "demo-w8/w4" in read_params(path)["variants"]


def test_two_pairs_that_dvc_would_call_the_same_are_refused(params):
    path = params(of={"  mine:": "  demo-w8:", "  w4:": "  w8-w4:"})
    read_params(path)
    path = params(of={"  mine:": "  demo-w8:", "  w8: ": "  w8-w8: ", "  w4:": "  w8:"})
    assert "demo/w8-w8 and demo-w8/w8: DVC would call both demo-w8-w8" in refusal(path)


@pytest.mark.parametrize("block", ["models: {}\n", "models:\n", "models: [demo]\n"])
def test_a_block_without_models_is_refused(params, block):
    text = f"baseline: method=float\n{block}variants:\n  w8: method=rtn\n"
    assert "`models:` needs a mapping of names to overrides" in refusal(params(text))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ("[demo/w8, min/w4]", "pairs: min/w4: `models:` has no min; it has demo, mine (did you mean mine?)"),
        ("[demo/w8, mine/w5]", "pairs: mine/w5: `variants:` has no w5; it has w8, w4"),
        ("[demo, mine/w4]", "pairs: demo is no pair; give MODEL/VARIANT, such as demo/w8"),
        ("[demo/w8, demo/w8, mine/w4]", "pairs: demo/w8 stands there twice"),
        ("[demo/w8]", "pairs: none is of mine; name one, or remove models.mine"),
        ("demo/w8", "pairs: needs a list of MODEL/VARIANT"),
    ],
)
def test_pairs_that_name_nothing_are_refused(params, pairs, said):
    assert said in refusal(params(PARAMS + f"pairs: {pairs}\n"))


def test_pairs_need_models(params):
    text = "baseline: method=float\npairs: [demo/w8]\nvariants:\n  w8: method=rtn\n"
    assert "`pairs:` names models, but there is no `models:`" in refusal(params(text))


def test_all_faults_are_told_at_once(params):
    path = params(of={"demo: model=demo": "demo: calibration=demo", "bits=4": "bits=4 model=demo"})
    found = refusal(path)
    assert "models.demo" in found
    assert "variants.w4" in found
