"""Checks of a served model's answers against the float model's: a small model may loop before any quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

EMPTY, UNREADABLE, DEGENERATE, REPEATING = "empty", "unreadable", "degenerate", "repeating"

UNREADABLE_SHARE = 0.1
SINGLE_CHARACTER_SHARE = 0.6
# A loop is a passage that ends the text four times or more, over at least 24 characters and three tenths of the text.
LOOP_TIMES, LOOP_CHARACTERS, LOOP_SHARE = 4, 24, 0.3
HABIT = 2
# Greedy answers of sound quantized models loop now and then; a broken kernel makes nearly all of them loop.
LOOPING_SHARE = 1 / 3


class AnswerLike(Protocol):
    """The parts of an answer that are checked."""

    @property
    def kind(self) -> str:
        """`completion` or `chat`."""

    @property
    def prompt(self) -> str:
        """The question."""

    @property
    def text(self) -> str:
        """The answer."""


def judge_answers(answers: Sequence[AnswerLike], baseline: Sequence[AnswerLike] | None) -> list[str]:
    """The faults of the answers, one line each.

    Args:
        answers: the variant's.
        baseline: the float model's. A defect that its answer to the same prompt has too is not a fault. A float model
            that loops will loop on other prompts after any small change of its weights, and one that does not may begin
            to. Loops are therefore not a fault while at most `HABIT` times as many answers loop as of the float model, or
            at most `LOOPING_SHARE` of all. With None every defect is a fault.
    """
    excused = {(answer.kind, answer.prompt): defects(answer.text) for answer in baseline or ()}
    checked = [(answer, defects(answer.text)) for answer in answers]
    loops = sum(REPEATING in defect for _, defect in checked)
    habit = baseline is not None and loops <= max(
        HABIT * sum(REPEATING in defect for defect in excused.values()), LOOPING_SHARE * len(checked)
    )
    faults = []
    for answer, own in checked:
        for defect, detail in own.items():
            if defect in excused.get((answer.kind, answer.prompt), {}) or (defect == REPEATING and habit):
                continue
            faults.append(f"{answer.kind} {answer.prompt!r}: the answer is {defect} ({detail})")
    return faults


def defects(text: str) -> dict[str, str]:
    """The defects of a text, each with its detail."""
    if not text.strip():
        return {EMPTY: "no visible character"}
    found = {}
    # An answer cut off within a character ends in a replacement character, which is not a defect.
    whole = text.rstrip("\ufffd") or text
    unreadable = sum(not (letter.isprintable() or letter in "\n\t\r") or letter == "\ufffd" for letter in whole)
    if unreadable > UNREADABLE_SHARE * len(whole):
        found[UNREADABLE] = f"{unreadable} of {len(whole)} characters cannot be shown"
    visible = [letter for letter in whole if not letter.isspace()]
    if len(visible) >= 8:
        letter = max(set(visible), key=visible.count)
        if visible.count(letter) > SINGLE_CHARACTER_SHARE * len(visible):
            found[DEGENERATE] = f"{visible.count(letter)} of {len(visible)} visible characters are {letter!r}"
    loop = ending_loop(whole)
    if loop is not None:
        found[REPEATING] = f"it repeats {loop!r} to the end"
    return found


def ending_loop(text: str) -> str | None:
    """The shortest passage that a text repeats to its end, perhaps cut off the last time; None if there is none."""
    enough = max(LOOP_CHARACTERS, LOOP_SHARE * len(text))
    for period in range(1, len(text) // LOOP_TIMES + 1):
        start = len(text)
        while start > period and text[start - 1] == text[start - 1 - period]:
            start -= 1
        length = len(text) - (start - period)
        if length >= max(LOOP_TIMES * period, enough):
            passage = text[start - period : start]
            return passage if passage.strip() else None
    return None
