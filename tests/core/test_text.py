from __future__ import annotations

from quantline.core.text import nearest


def test_a_misspelt_word_gets_a_hint_and_a_strange_one_none():
    assert nearest("evalute", ["evaluate", "quantize"]) == " (did you mean evaluate?)"
    assert nearest("xyz", ["evaluate", "quantize"]) == ""
    assert nearest("evaluate", []) == ""
