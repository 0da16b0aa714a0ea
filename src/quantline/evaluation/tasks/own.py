"""Tasks of one's own, from a file of questions, for lm-evaluation-harness.

A line is a JSON object. `question` and `answer`, both text, make an item of `own_answers`: the model must give the answer
greedily, token by token; scored by accuracy, and by the perplexity of the answer. With `choices` (a list of texts) it is an
item of `own_choices`, where `answer` is the right one, or its number from 0: scored by the likeliest choice, by total
(`acc`) and by length normalized (`acc_norm`) log-likelihood. The prompt is the question between "Question: " and
"\\nAnswer:", and the answer follows after a blank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.data.sampling import draw

Item = dict[str, Any]
ANSWERS, CHOICES = "own_answers", "own_choices"
_MOST_FAULTS = 5


def own_items(path: Path, seed: int, limit: int | None) -> dict[str, list[Item]]:
    """The items of each task, in an order that depends on the seed alone; a smaller number is a prefix of a larger one.

    Args:
        path: JSON lines.
        seed: of the order.
        limit: items of each task; None takes all.

    Raises:
        UserError: the file cannot be read, lines are no questions (with their numbers), or a task has only one item.
    """
    found: dict[str, list[tuple[int, Item]]] = {}
    faults = []
    for number, row in _rows(path):
        item = _item(row)
        if isinstance(item, str):
            faults.append(f"{path}:{number}: {item}")
            continue
        name = CHOICES if "choices" in item else ANSWERS
        found.setdefault(name, []).append((draw(seed, "own", number), item))
    if faults:
        more = f"\n  and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        raise UserError("\n  ".join(["tasks.path has lines that are no questions:", *faults[:_MOST_FAULTS]]) + more)
    if not found:
        raise UserError(f"{path}: has no questions; give lines with `question` and `answer`")
    for name, rows in found.items():
        if len(rows) < 2:
            raise UserError(
                f"{path}: gives one item of {name}, at least 2 are needed; give more questions of that kind"
            )
    return {name: [item for _, item in sorted(found[name], key=lambda pair: pair[0])[:limit]] for name in sorted(found)}


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tasks.path={path}: cannot be read ({error}); give a file of JSON lines in UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, f"is not JSON ({error})"


def _item(row: Any) -> Item | str:
    """The item of a row, or what is wrong with it."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        return 'has no question; a line is {"question": ..., "answer": ...}, with "choices" if there are any'
    context, answer, choices = f"Question: {row['question'].strip()}\nAnswer:", row.get("answer"), row.get("choices")
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            return "answer is not text; without choices it is what the model must say"
        return {"context": context, "target": f" {answer.strip()}"}
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(one, str) and one.strip() for one in choices)
    ):
        return "choices is no list of two texts or more"
    stripped = [one.strip() for one in choices]
    if len(set(stripped)) < len(stripped):
        return "two choices are the same"
    if isinstance(answer, str) and answer.strip() in stripped:
        label = stripped.index(answer.strip())
    elif type(answer) is int and 0 <= answer < len(stripped):
        label = answer
    else:
        return f"answer={answer!r} is none of the {len(stripped)} choices, and no number of one from 0"
    return {"context": context, "choices": [f" {one}" for one in stripped], "label": label}
