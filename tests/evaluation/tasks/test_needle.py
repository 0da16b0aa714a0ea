from __future__ import annotations

import re

import pytest

from quantline.config.tasks import NeedleConfig
from quantline.core.errors import UserError
from quantline.evaluation.tasks.needle import needle_items

TEXTS = [" ".join(f"w{text}x{word}" for word in range(130)) for text in range(6)]
HOW = NeedleConfig(context_words=60, needles=3)


def test_the_fact_stands_once_at_its_depth_and_is_asked_for_at_the_end():
    items = needle_items(HOW, TEXTS, 0, None)
    assert len(items) == 12
    assert {item["depth"] for item in items} == {0, 0.25, 0.5, 0.75, 1}
    for item in items:
        key = re.search(r"The code of the (\w+) is$", item["context"])[1]
        said = re.findall(rf"The code of the {key} is(\d| \d+\.)", item["context"])
        assert said == [f"{item['target']}."]
        assert len(re.findall(r"The code of the \w+ is \d{4}\.", item["context"])) == 3
        before = item["context"].index(f"{key} is{item['target']}.")
        words = [len(item["context"][:before].split("w")), len(item["context"].split("w"))]
        assert (words[0] / words[1]) == pytest.approx(1 - item["depth"], abs=0.1)


def test_every_document_gives_one_before_any_gives_a_second_and_fewer_are_a_prefix():
    items = needle_items(HOW, TEXTS, 0, 6)
    assert len({re.search(r"w(\d)x", item["context"])[1] for item in items}) == 6
    assert items == needle_items(HOW, TEXTS, 0, None)[:6]
    assert items != needle_items(HOW, TEXTS, 1, 6)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(UserError, match="0 passages of 200 words"):
        needle_items(NeedleConfig(context_words=200), TEXTS, 0, None)
