"""A finished search as plain values, for MLflow and the report: its goal, its answer, what became of every candidate."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from quantline.planning.search import Candidate, Found, Goal, Measurement

# winner: the answer. finalist: measured on all documents. met: it meets the goal on a part of them, another is better.
# raced out: dropped on a part of them. failed: it could not be made. not tried: it was not worth a measurement, or is too
# large. pruned: method, backend or server do not take it.
State = Literal["winner", "finalist", "met", "raced out", "failed", "not tried", "pruned"]
STATES: tuple[State, ...] = ("winner", "finalist", "met", "raced out", "failed", "not tried", "pruned")


def search_record(
    found: Found, candidates: Sequence[Candidate], pruned: Mapping[str, str], goal: Goal, *, documents: Sequence[int],
    line: Sequence[str] | None, command: str, times: tuple[float, float],
) -> dict[str, Any]:  # fmt: skip
    """What a search came to. Equal searches give equal records, but for `started` and `seconds`.

    Args:
        found: the answer.
        candidates: all that it could choose from.
        pruned: why others are not among them, by name.
        goal: what was asked for.
        documents: their number in each share.
        line: the overrides of the answer; None if nothing meets the goal.
        command: what was typed.
        times: when it started, seconds since the epoch, and how long it took.

    Returns:
        goal, minimize, loss_at_most, size_at_most (bytes), command, documents (of the whole text), answer, line, nearest,
        measured (their number), started, seconds, and `candidates`: rows of name, state, why, line, method, size_bytes,
        predicted_kl, change_percent, low, high, kl, documents, share (of the text), speed_up
        (None: measured by the caller) and front.
    """
    last = {one.candidate: one for one in found.measurements}
    rows = [_row(one, last.get(one.name), found, goal, documents) for one in candidates]
    rows += [{**_EMPTY, "name": name, "state": "pruned", "why": why} for name, why in pruned.items()]
    order = {state: place for place, state in enumerate(STATES)}
    rows.sort(key=lambda row: (order[row["state"]], row["size_bytes"] or 0, row["name"]))
    return {
        "goal": goal_text(goal), "minimize": goal.minimize, "loss_at_most": goal.loss_at_most,
        "size_at_most": goal.size_at_most, "command": command, "documents": documents[-1],
        "answer": found.best.name if found.best else None, "line": None if line is None else shlex.join(line),
        "nearest": found.nearest.name if found.nearest else None, "measured": len(last),
        "started": times[0], "seconds": times[1], "candidates": rows,
    }  # fmt: skip


_EMPTY: dict[str, Any] = dict.fromkeys(
    ("name", "state", "why", "line", "method", "size_bytes", "predicted_kl", "change_percent", "low", "high", "kl",
     "documents", "share", "speed_up"),
) | {"front": False}  # fmt: skip


def goal_text(goal: Goal) -> str:
    """The goal in words."""
    aim = "the smallest variant" if goal.minimize == "size" else "the variant with the least loss"
    limits = []
    if goal.loss_at_most is not None:
        limits.append(f"whose perplexity grows by at most {100 * goal.loss_at_most:.3g} %")
    if goal.size_at_most is not None:
        limits.append(f"of at most {goal.size_at_most / 10**9:.4g} GB")
    return " ".join([aim, " and ".join(limits)])


def _row(
    one: Candidate, last: Measurement | None, found: Found, goal: Goal, documents: Sequence[int]
) -> dict[str, Any]:
    row = {
        **_EMPTY, "name": one.name, "line": shlex.join(one.overrides), "method": one.family, "size_bytes": one.size,
        "predicted_kl": one.predicted,
    }  # fmt: skip
    if last is None:
        return {**row, "state": "not tried", "why": found.untried.get(one.name, "the search ended before")}
    if math.isinf(last.loss):
        return {**row, "state": "failed", "why": "it could not be made; what was said is in the search's output"}
    state, why = _state(one, last, found, goal, documents)
    return {
        **row, "state": state, "why": why, "change_percent": 100 * last.loss, "low": 100 * last.low,
        "high": 100 * last.high, "kl": last.kl, "documents": documents[last.share],
        "share": documents[last.share] / documents[-1], "front": one.name in found.front,
    }  # fmt: skip


def _state(one: Candidate, last: Measurement, found: Found, goal: Goal, documents: Sequence[int]) -> tuple[State, str]:
    whole = last.share == len(documents) - 1
    on = "on all documents" if whole else f"on {documents[last.share]} of {documents[-1]} documents"
    if found.best is not None and one.name == found.best.name:
        return "winner", f"{goal_text(goal)}, {on}"
    if found.verdicts.get(one.name) == "meets":
        better = f"{found.best.name} is {'smaller' if goal.minimize == 'size' else 'better'}" if found.best else ""
        return ("finalist" if whole else "met"), f"meets the goal {on}; {better}"
    limit = goal.loss_at_most
    if limit is not None and last.low > limit:
        why = f"its whole interval is beyond {100 * limit:.3g} % {on}"
    elif limit is not None and last.high > limit:
        why = f"its interval reaches beyond {100 * limit:.3g} % {on}"
    else:
        why = f"its whole interval is beyond that of the best {on}"
    return ("finalist" if whole else "raced out"), why
