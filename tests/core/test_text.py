from __future__ import annotations

import pytest

from quantline.core.text import alternatives, binary_size, counted, decimal_size, digits, listed, nearest, percent


def test_lists_read_as_people_write_them():
    assert alternatives([4]) == "4"
    assert alternatives([2, 4, 8]) == "2, 4 or 8"
    assert alternatives([True, None]) == "true or null"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert (listed(["a"]), listed([])) == ("a", "")


def test_a_misspelt_word_gets_a_hint_and_a_strange_one_none():
    assert nearest("evalute", ["evaluate", "quantize"]) == " (did you mean evaluate?)"
    assert nearest("xyz", ["evaluate", "quantize"]) == ""
    assert nearest("evaluate", []) == ""


def test_a_share_and_a_count_are_written_as_people_do():
    assert (percent(0.267), percent(-0.0123, 2, sign=True), percent(1, 0)) == ("26.7 %", "-1.23 %", "100 %")
    assert [counted(number, "token") for number in (0, 1, 1.5, 2)] == ["0 tokens", "1 token", "1.5 tokens", "2 tokens"]


def test_what_is_not_finite_is_said():
    assert [digits(value, 3) for value in (float("nan"), float("inf"), 0.0)] == ["nan", "inf", "0"]


@pytest.mark.parametrize(
    ("count", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (2048, "2.05 kB", "2.00 KiB"),
        (5 * 2**20, "5.24 MB", "5.00 MiB"),
        (24 * 2**30, "25.8 GB", "24.00 GiB"),
        (140 * 2**30, "150 GB", "140 GiB"),
    ],
)
def test_sizes(count, decimal, binary):
    assert (decimal_size(count), binary_size(count)) == (decimal, binary)


def test_digits_are_significant_ones():
    assert [digits(value, 3) for value in (0, 0.012345, 1.5, 1234.5, 1e7, 1e-5)] == [
        "0", "0.0123", "1.50", "1234", "1.00e+07", "1.00e-05",
    ]  # fmt: skip
