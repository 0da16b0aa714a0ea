"""What the search says; that it finds is in tests/planning/test_search.py."""

from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.planning.search import Candidate, Found, Goal, Measurement
from quantline.planning.search_space import Space
from stages import search


def test_the_answer_says_on_how_many_documents_it_was_measured():
    one = Candidate("rtn-w4", ("method=rtn", "bits=4"), 100, 0.1, "rtn")
    seen = Measurement("rtn-w4", 0, 0.1, 0.05, 0.2)
    found = Found(one, None, {"rtn-w4": "meets"}, (seen,), ("rtn-w4",))
    text = search._text(found, Space([one], {}, {}), Goal("size", 0.3), [8, 12, 24, 48], ["device=cpu"])
    assert "best: rtn-w4: 100 B, perplexity +10.00 % [+5.00, +20.00] on 8 of 48 documents" in text
    assert text.endswith("method=rtn bits=4 device=cpu")


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
