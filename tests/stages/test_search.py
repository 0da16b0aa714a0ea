"""What the search says; that it finds is in tests/planning/test_search.py."""

from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.planning.search import Candidate, Found, Goal, Measurement
from quantline.planning.search_record import search_record
from quantline.planning.search_space import Space
from stages import search


def text(one: Candidate, **changes: object) -> str:
    seen = Measurement(one.name, 0, 0.1, 0.05, 0.2)
    found, goal = Found(one, None, {one.name: "meets"}, (seen,), (one.name,)), Goal("size", 0.3)
    record = search_record(
        found, [one], {}, goal, documents=[8, 12, 24, 48], line=one.overrides, command="", times=(0.0, 0.0)
    )  # fmt: skip
    record["candidates"][0].update(changes)
    return search._text(found, Space([one], {}, {}), goal, record, ["device=cpu"])


def test_the_answer_says_on_how_many_documents_it_was_measured_and_how_fast_it_is():
    one = Candidate("rtn-w4", ("method=rtn", "bits=4"), 100, 0.1, "rtn")
    said = text(one)
    assert "best: rtn-w4: 100 B, perplexity +10.00 % [+5.00, +20.00] on 8 of 48 documents\n" in said
    assert said.endswith("method=rtn bits=4 device=cpu")
    assert "on 8 of 48 documents, 1.25x as fast as float" in text(one, speed_up=1.25)


def test_a_kind_of_cache_is_told_to_be_outside_of_the_figures():
    one = Candidate("rtn-w4-kv-fp8", ("method=rtn", "bits=4", "serve.kv_cache_dtype=fp8"), 100, 0.1, "rtn")
    assert "serve.kv_cache_dtype=fp8: what the cache loses is not in these figures" in text(one)


@pytest.mark.parametrize(("given", "groups"), [(None, []), ("64,128,64", [64, 128]), ("-1", [-1])])
def test_group_sizes_are_numbers(given, groups):
    assert search._groups(given) == groups


def test_a_group_size_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="groups=64,small: small is no group size; give 32,64,128"):
        search._groups("64,small")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"minimize": "size"}, "give loss.at_most"), ({"minimize": "loss"}, "give size.at_most_gb"),
        ({"minimize": "size", "loss.at_most": "-1"}, "loss.at_most=-1: give a positive number"),
    ],
)  # fmt: skip
def test_a_goal_that_says_nothing_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        search._goal({"loss.at_most": None, "size.at_most_gb": None, **given})


def test_a_method_that_does_not_exist_is_refused_with_those_that_do():
    assert set(search._methods("gptq,fp8")) == {"gptq", "fp8"}
    with pytest.raises(UserError, match="methods=gptq,zzz: zzz is no method; there are autoround, awq, bnb, fp4"):
        search._methods("gptq,zzz")
    with pytest.raises(UserError, match="float is no method"):
        search._methods("float")
