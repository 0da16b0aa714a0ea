"""Questions of one's own: what a line becomes, and what is said of lines that are none."""

from __future__ import annotations

import json

import pytest
import yaml

from quantline.core.errors import UserError
from quantline.evaluation.tasks.local import write_tasks
from quantline.evaluation.tasks.own import own_items

ASKED = [{"question": f"What is {number} + 1? ", "answer": str(number + 1)} for number in range(12)]
CHOSEN = [
    {"question": f"Which is {number}?", "choices": ["a", f"{number}", "c"], "answer": 1 if number % 2 else f"{number}"}
    for number in range(5)
]


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_questions_and_choices_become_items_of_two_tasks(tmp_path):
    found = own_items(write(tmp_path / "own.jsonl", [*ASKED, *CHOSEN]), 0, None)
    assert {name: len(items) for name, items in found.items()} == {"own_answers": 12, "own_choices": 5}
    assert {"context": "Question: What is 3 + 1?\nAnswer:", "target": " 4"} in found["own_answers"]
    assert all(item["choices"][item["label"]] == item["choices"][1] for item in found["own_choices"])
    assert found["own_choices"][0]["choices"][0] == " a"
    write_tasks(found, tmp_path)
    definition = yaml.safe_load((tmp_path / "own_choices.yaml").read_text())
    assert (definition["task"], definition["output_type"]) == ("own_choices", "multiple_choice")


def test_fewer_items_are_a_prefix_and_another_seed_is_another_order(tmp_path):
    path = write(tmp_path / "own.jsonl", ASKED)
    whole = own_items(path, 0, None)["own_answers"]
    assert own_items(path, 0, 4)["own_answers"] == whole[:4]
    assert own_items(path, 1, None)["own_answers"] != whole
    assert sorted(map(str, own_items(path, 1, None)["own_answers"])) == sorted(map(str, whole))


def test_lines_that_are_no_questions_are_named_together(tmp_path):
    bad = [
        "{", [1], {"answer": "a"}, {"question": "q"}, {"question": "q", "choices": ["a"], "answer": 0},
        {"question": "q", "choices": ["a", "a"], "answer": 0}, {"question": "q", "choices": ["a", "b"], "answer": 2},
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        own_items(write(tmp_path / "own.jsonl", [*ASKED, *bad]), 0, None)
    text = str(caught.value)
    assert all(f"own.jsonl:{number}: " in text for number in range(13, 18))
    assert "and 2 more" in text
    for number, words in ((5, "two choices are the same"), (6, "answer=2 is none of the 2 choices")):
        with pytest.raises(UserError, match=words):
            own_items(write(tmp_path / "one.jsonl", [bad[number]]), 0, None)


def test_a_file_without_questions_or_with_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no questions"):
        own_items(write(tmp_path / "none.jsonl", []), 0, None)
    with pytest.raises(UserError, match="gives one item of own_answers"):
        own_items(write(tmp_path / "one.jsonl", ASKED[:1]), 0, None)
    with pytest.raises(UserError, match="cannot be read"):
        own_items(tmp_path / "missing.jsonl", 0, None)
