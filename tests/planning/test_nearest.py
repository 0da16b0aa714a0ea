from __future__ import annotations

import json
from itertools import product

import pytest
from places import HERE, ORDER, THERE

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
