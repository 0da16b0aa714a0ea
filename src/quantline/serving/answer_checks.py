"""Checks of a served model's answers, beside the float model's: a small model may loop before any quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

EMPTY, UNREADABLE, DEGENERATE, REPEATING = "empty", "unreadable", "degenerate", "repeating"

UNREADABLE_SHARE = 0.1
SINGLE_CHARACTER_SHARE = 0.6
# A loop is what comes four times or more at the end, over 24 characters and three tenths of the text at least.
LOOP_TIMES, LOOP_CHARACTERS, LOOP_SHARE = 4, 24, 0.3
HABIT = 2


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
        baseline: the float model's. A defect that its answer to the same prompt has too is no fault. A float model that
            loops will loop for other prompts after any small change of its weights, so loops are no fault while no more
            than `HABIT` times as many answers loop as the float model's. None accepts no defect.
    """
    excused = {(answer.kind, answer.prompt): defects(answer.text) for answer in baseline or ()}
    found = [(answer, defects(answer.text)) for answer in answers]
    loops = sum(REPEATING in defect for _, defect in found)
    habit = loops <= HABIT * sum(REPEATING in defect for defect in excused.values())
    faults = []
    for answer, held in found:
        for defect, detail in held.items():
            if defect in excused.get((answer.kind, answer.prompt), {}) or (defect == REPEATING and habit):
                continue
            faults.append(f"{answer.kind} {answer.prompt!r}: the answer is {defect} ({detail})")
    return faults


def defects(text: str) -> dict[str, str]:
    """The defects of a text, each with its detail."""
    if not text.strip():
        return {EMPTY: "no visible character"}
    found = {}
    # An answer cut off within a character ends in a replacement character, which is no defect.
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
        found[REPEATING] = f"it ends in {loop!r} over and over"
    return found


def ending_loop(text: str) -> str | None:
    """The shortest passage that a text repeats to its end, perhaps cut off in the last turn; None where it does not."""
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
