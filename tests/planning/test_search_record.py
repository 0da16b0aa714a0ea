"""What became of each candidate of a search, in plain values."""

from __future__ import annotations

import json
import math

import pytest

from quantline.planning.search import Candidate, Found, Goal, Measurement
from quantline.planning.search_record import STATES, goal_text, search_record

DOCUMENTS = [8, 24]
GOAL = Goal("size", 0.01)


def candidate(name, size):
    return Candidate(
        name, (f"method={name}", 'layers.rules=[{match: "a.b", bits: 8}]'), size, 0.01, name.partition("-")[0]
    )


CANDIDATES = [candidate(name, size) for name, size in
              (("rtn-w4", 100), ("rtn-5", 120), ("rtn-6", 140), ("rtn-w8", 200), ("gptq-w4", 101),
               ("awq-w4", 99))]  # fmt: skip
MEASURED = (
    Measurement("rtn-w4", 0, 0.05, 0.04, 0.06, 0.07), Measurement("rtn-5", 0, 0.011, 0.009, 0.013),
    Measurement("rtn-5", 1, 0.0095, 0.008, 0.011, 0.01), Measurement("rtn-6", 0, 0.002, 0.001, 0.003, 0.001),
    Measurement("rtn-6", 1, 0.003, 0.002, 0.004, 0.001), Measurement("rtn-w8", 0, 0.0, -0.001, 0.001, 0.0),
    Measurement("gptq-w4", 0, math.inf, math.inf, math.inf),
)  # fmt: skip


def record(best="rtn-6", goal=GOAL):
    by_name = {one.name: one for one in CANDIDATES}
    verdicts = {"rtn-w4": "fails", "rtn-5": "fails", "rtn-6": "meets", "rtn-w8": "meets", "gptq-w4": "fails"}
    found = Found(
        by_name.get(best), None if best else by_name["rtn-5"], verdicts, MEASURED, ("rtn-w4", "rtn-5", "rtn-6", "rtn-w8"),
        {"awq-w4": "not expected to be better than what was measured"},
    )  # fmt: skip
    return search_record(
        found, CANDIDATES, {"awq-w8": "awq takes 4"}, goal, documents=DOCUMENTS, line=["method=rtn"] if best else None,
        command="python -m stages.search", times=(5.0, 60.0),
    )  # fmt: skip


def test_each_candidate_has_the_state_that_it_ended_in_and_why():
    rows = {row["name"]: row for row in record()["candidates"]}
    assert {name: (row["state"], row["documents"]) for name, row in rows.items()} == {
        "rtn-6": ("winner", 24), "rtn-5": ("finalist", 24), "rtn-w8": ("met", 8), "rtn-w4": ("raced out", 8),
        "gptq-w4": ("failed", None), "awq-w4": ("not tried", None), "awq-w8": ("pruned", None),
    }  # fmt: skip
    assert rows["rtn-w4"]["why"] == "its whole interval is beyond 1 % on 8 of 24 documents"
    assert rows["rtn-5"]["why"] == "its interval reaches beyond 1 % on all documents"
    assert rows["rtn-w8"]["why"] == "meets the goal on 8 of 24 documents; rtn-6 is smaller"
    assert rows["awq-w8"]["why"] == "awq takes 4"
    assert (rows["rtn-6"]["change_percent"], rows["rtn-6"]["kl"]) == (pytest.approx(0.3), 0.001)
    assert [STATES.index(row["state"]) for row in record()["candidates"]] == list(range(len(STATES)))


def test_a_record_is_strict_json_and_says_goal_answer_and_line():
    found = json.loads(json.dumps(record(), allow_nan=False))
    assert found["goal"] == "the smallest variant whose perplexity grows by at most 1 %"
    assert (found["answer"], found["line"], found["nearest"], found["measured"]) == ("rtn-6", "method=rtn", None, 5)
    none = record(best=None)
    assert (none["answer"], none["line"], none["nearest"]) == (None, None, "rtn-5")
    assert "winner" not in {row["state"] for row in none["candidates"]}


def test_a_goal_is_told_in_words():
    assert goal_text(Goal("loss", size_at_most=5 * 10**9)) == "the variant with the least loss of at most 5 GB"
    both = goal_text(Goal("size", 0.02, 10**9))
    assert both == "the smallest variant whose perplexity grows by at most 2 % and of at most 1 GB"
