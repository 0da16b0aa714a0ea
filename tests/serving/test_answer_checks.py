from __future__ import annotations

from dataclasses import dataclass

import pytest

from quantline.serving.answer_checks import defects, ending_loop, judge_answers


@dataclass(frozen=True)
class Said:
    prompt: str
    text: str
    kind: str = "completion"


GOOD = "The option() command is typically used to create a cache entry, which users can then set."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GOOD, set()),
        ("Yes.", set()),
        ("", {"empty"}),
        (" \n\t ", {"empty"}),
        ("\ufffd\ufffdab\ufffd cde", {"unreadable"}),
        ("abc \x00\x01\x02 def", {"unreadable"}),
        ("!" * 60, {"degenerate", "repeating"}),
        ("ok " + "!!! " * 5, {"degenerate"}),
        ("It says " + "that the value is " * 6, {"repeating"}),
        ("It says " + "that the value is " * 6 + "that the va", {"repeating"}),
        ("数量は " + "値です。" * 10, {"repeating"}),
    ],
)
def test_defects_of_a_text(text, found):
    assert set(defects(text)) == found


def test_an_answer_cut_off_within_a_character_is_readable():
    assert defects("Größ\ufffd") == {}
    assert set(defects("\ufffd\ufffd")) == {"unreadable"}


def test_a_list_and_a_short_rule_are_no_loop():
    assert ending_loop("1. red\n2. green\n3. blue\n4. black\n5. white\n") is None
    assert ending_loop("Heading\n=======\n\nSome text after it, and then the end") is None
    assert ending_loop(GOOD + " ...............") is None


def test_a_loop_is_named_by_its_shortest_passage():
    assert sorted(ending_loop("start: " + "ab" * 20)) == ["a", "b"]
    assert ending_loop("x" * 30) == "x"


LOOP = "and so on " * 8


def test_a_defect_is_refused_unless_the_float_model_has_it_for_the_same_prompt():
    answers = [Said("a", LOOP), Said("b", LOOP), Said("c", LOOP), Said("d", GOOD)]
    assert len(judge_answers(answers, None)) == 3
    baseline = [Said("a", "again and again " * 8), *(Said(prompt, GOOD) for prompt in "bcd")]
    faults = judge_answers(answers, baseline)
    assert [fault.split(":")[0] for fault in faults] == ["completion 'b'", "completion 'c'"]


def test_a_model_that_loops_by_itself_may_loop_for_other_prompts_but_not_for_many_more():
    baseline = [Said("a", LOOP), *(Said(prompt, GOOD) for prompt in "bcd")]
    assert judge_answers([*(Said(prompt, GOOD) for prompt in "abc"), Said("d", LOOP)], baseline) == []
    assert len(judge_answers([Said("a", GOOD), *(Said(prompt, LOOP) for prompt in "bcd")], baseline)) == 3


def test_where_the_float_model_never_loops_a_third_of_the_answers_may():
    prompts = "abcdef"
    baseline = [Said(prompt, GOOD) for prompt in prompts]
    for loops, faults in ((1, 0), (2, 0), (3, 3), (6, 6)):
        answers = [Said(prompt, LOOP if number < loops else GOOD) for number, prompt in enumerate(prompts)]
        assert len(judge_answers(answers, baseline)) == faults


def test_an_excuse_covers_one_defect_and_one_endpoint():
    assert len(judge_answers([Said("a", "!" * 60)], [Said("a", "and so on " * 8)])) == 1
    assert len(judge_answers([Said("a", "", "chat")], [Said("a", "", "completion")])) == 1
    assert judge_answers([Said("a", "")], [Said("a", " ")]) == []
