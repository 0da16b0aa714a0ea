from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product

import pytest
from places import HERE, ORDER, THERE

from quantline.pipeline.preflight import method_defaults
from quantline.planning.nearest import nearest
from quantline.planning.preflight import check
from quantline.planning.spec import VariantSpec


@pytest.fixture
def nearest_here(variant, model, defaults):
    return lambda method, **changes: nearest(variant(method, **changes), model, HERE, defaults)


def test_the_nearest_variant_of_every_refused_one_is_not_refused(variant, model, defaults):
    """Parsed back from its overrides: what is printed is what was checked."""
    refused = 0
    options = {
        "gptq": ({}, {"sym": False}, {"desc_act": True}),
        "rtn": ({}, {"sym": False}),
        "awq": ({}, {"version": "gemv"}),
    }
    for method, bits, size, convert, place in product(
        ORDER, (2, 3, 4, 8), (-1, 128, 512), ("auto", "keep", "awq"), (HERE, THERE)
    ):
        for own in options[method]:
            asked = variant(method, bits, size, convert=convert, **own)
            if check(asked, model, place).passes():
                continue
            refused += 1
            found = nearest(asked, model, place, defaults)
            assert found is not None, asked
            words = dict(word.split("=") for word in found.split())
            name = words.pop("method")
            values = {key.removeprefix("method."): json.loads(value) if value in ("true", "false", "null") else value
                      for key, value in words.items() if key.startswith("method.")}  # fmt: skip
            again = variant(
                name, int(words.get("bits", 4)), int(words.get("group_size", 128)),
                convert=words.get("convert.target", convert), **values,
            ) if name != "float" else VariantSpec("float")  # fmt: skip
            assert check(again, model, place).passes(), (asked, found)
    assert refused > 100


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("gptq", {"bits": 8}, "method=gptq bits=4 group_size=128"),
        ("gptq", {"bits": 4, "sym": False}, "method=gptq bits=4 group_size=128"),
        ("gptq", {"group_size": 256}, "method=gptq bits=4 group_size=128"),
        ("rtn", {"sym": False, "bits": 8}, "method=rtn bits=4 group_size=128 method.sym=false"),
        ("rtn", {"lm_head": True}, "method=rtn bits=4 group_size=128 lm_head=float"),
        ("gptq", {"serve_dtype": "float32"}, "method=gptq bits=4 group_size=128 serve.dtype=bfloat16"),
        ("rtn", {"rules": ({"match": "*.q_proj", "bits": 8},)}, "method=rtn bits=4 group_size=128 layers=uniform"),
    ],
)
def test_the_nearest_variant_changes_little(nearest_here, method, changes, expected):
    assert nearest_here(method, **changes) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # Bits and groups are those of the scheme, so none are said, and none are kept for another method.
        (VariantSpec("fp8", 8, -1, {"scheme": "block"}), "method=fp8"),
        (VariantSpec("fp8", 8, -1, {"scheme": "static"}), "method=fp8"),
        (VariantSpec("fp4", 4, 16, {"scheme": "nvfp4"}), "method=awq bits=4 group_size=128"),
        (VariantSpec("mxfp8", 8, 32, {"scheme": "mxfp8"}), "method=fp8"),
    ],
)
def test_the_nearest_of_a_scheme_is_another_or_another_method_in_its_own_groups(model, root, asked, expected):
    schemes = {name: ["llmcompressor"] for name in ("fp8", "fp4", "mxfp8")}
    order = {"awq": ["autoawq"], **schemes} if asked.method == "fp4" else schemes
    here = replace(HERE, target=replace(HERE.target, amx=False), order=order)
    assert nearest(asked, model, here, method_defaults(root)) == expected


def settings_of(remedy):
    """What a remedy says to set first, by option; what is said behind `or`, a comma or a semicolon are others."""
    first = re.split(r",| or |;", remedy)[0]
    return {key: json.loads(value) if value in ("true", "false", "null") else value
            for key, value in re.findall(r"([\w.]+)=(-?[\w.]+)", first)}  # fmt: skip


def changed(asked, settings):
    """A variant with what a remedy sets."""
    own = {key.removeprefix("method."): value for key, value in settings.items() if key.startswith("method.")}
    plain = {"convert.target": "convert", "serve.dtype": "serve_dtype", "bits": "bits", "group_size": "group_size"}
    values = {plain[key]: int(value) if key in ("bits", "group_size") else value
              for key, value in settings.items() if key in plain}  # fmt: skip
    return replace(asked, options={**asked.options, **own}, **values)


def test_what_the_rules_about_gptq_advise_ends_the_rule(variant, model):
    tried = set()
    for bits, size, sym, reordered, target, place in product(
        (2, 3, 4, 8), (-1, 64, 128, 256), (True, False), (True, False), ("auto", "keep", "gptq_v2"), (HERE, THERE)
    ):
        asked = variant("gptq", bits, size, sym=sym, desc_act=reordered, convert=target)
        for finding in check(asked, model, place).refused:
            settings = settings_of(finding.remedy) if finding.remedy.startswith("set ") else {}
            if finding.step != "serve" or not settings:
                continue
            tried.add(finding.id)
            after = changed(asked, settings)
            assert after != asked, (asked, finding.remedy)
            assert finding.id not in {one.id for one in check(after, model, place).refused}, (asked, finding.remedy)
    assert {"gptq-bits", "gptq-asymmetric", "gptq-group-size", "gptq-grouped-desc-act"} <= tried
