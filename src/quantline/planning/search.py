"""Finds the variant that meets a goal with few measurements: what is known beforehand, what is learned, and races.

The size of a candidate is known exactly, and its loss is predicted by the sum of its units' divergences. What is not known
is by how much the measured loss differs from that: by a factor of all candidates, one of each method, and one of each
candidate. These are learned from the measurements as the posterior of a normal prior on their logarithms. The next
candidate is the one with the largest expected gain. It races: it is measured on growing shares of the documents, until
its interval is on one side of the limit. Nothing is drawn, so that the same measurements give the same search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

# Standard deviations of the logarithms: of the common factor, of a method's, of a candidate's. The prediction is a
# divergence in nats, the loss the growth of the perplexity. On the demo model they were within a factor of 1.1.
_COMMON, _FAMILY, _OWN = 1.0, 0.5, 0.25
# A search ends where no candidate is expected to gain more than this share of the best.
_WORTH = 0.005
# Smallest loss whose logarithm is taken; a measured one may be below zero.
_FLOOR = 1e-5
_TOO_LARGE = "too large"


@dataclass(frozen=True)
class Candidate:
    """A variant. size: bytes of its checkpoint. predicted: its loss in nats per token. family: its method."""

    name: str
    overrides: tuple[str, ...]
    size: int
    predicted: float
    family: str


@dataclass(frozen=True)
class Goal:
    """What is asked for. loss_at_most: growth of the perplexity, relative. size_at_most: bytes of the checkpoint."""

    minimize: Literal["size", "loss"]
    loss_at_most: float | None = None
    size_at_most: int | None = None


@dataclass(frozen=True)
class Measurement:
    """The relative growth of the perplexity on a share of the documents, with its interval; share: its number.

    All three are infinite for a candidate that could not be made. kl: divergence from the float model on the smallest share,
    nats a token; None if it was not measured.
    """

    candidate: str
    share: int
    loss: float
    low: float
    high: float
    kl: float | None = None


@dataclass(frozen=True)
class Found:
    """The answer.

    best: None if nothing measured meets the goal. nearest: what then comes nearest. verdicts: "meets" or "fails" by
    candidate. measurements: all of them, in order. front: measured candidates than which no other is smaller and better.
    untried: candidates that were not measured, and why.
    """

    best: Candidate | None
    nearest: Candidate | None
    verdicts: dict[str, str] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    front: tuple[str, ...] = ()
    untried: dict[str, str] = field(default_factory=dict)


Judge = Callable[[Candidate, int], Measurement]


def search(
    candidates: Sequence[Candidate], goal: Goal, judge: Judge, *, shares: int, most: int,
    tell: Callable[[str], None] = lambda _text: None,
) -> Found:  # fmt: skip
    """Search for the best candidate.

    Args:
        candidates: with different names.
        goal: what is asked for.
        judge: measures a candidate on a share of the documents; the shares 0 to `shares - 1` grow, the last one is all.
        shares: how many shares there are.
        most: candidates to measure.
        tell: gets a line for each step.
    """
    known: dict[str, Measurement] = {}
    verdicts: dict[str, str] = {}
    measured: list[Measurement] = []
    fits = [one for one in candidates if goal.size_at_most is None or one.size <= goal.size_at_most]

    def measure(one: Candidate, share: int) -> str:
        found = judge(one, share)
        measured.append(found)
        known[one.name] = found
        verdict = _verdict(found, goal, _best_loss(known, verdicts), last=share == shares - 1)
        span = f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        tell(f"{one.name}: {100 * found.loss:+.2f} % {span} {verdict or '...'}")
        return verdict

    while True:
        chosen = _next(fits, goal, known, verdicts) if len(verdicts) < most else None
        if chosen is not None:
            verdict, share = "", 0
            while not verdict:
                verdict, share = measure(chosen, share), share + 1
            verdicts[chosen.name] = verdict
            continue
        # The answer is never given on a part of the documents: intervals over few of them are too narrow.
        best = _answer(candidates, goal, known, verdicts, measured).best
        if best is None or known[best.name].share == shares - 1:
            break
        del verdicts[best.name]
        verdicts[best.name] = measure(best, shares - 1)
    found = _answer(candidates, goal, known, verdicts, measured)
    if len(verdicts) < most:
        return found
    stopped = {name: why if why == _TOO_LARGE else f"{most} candidates were measured before" for name, why in
               found.untried.items()}  # fmt: skip
    return replace(found, untried=stopped)


def _verdict(found: Measurement, goal: Goal, best: Measurement | None, *, last: bool) -> str:
    """Whether it "meets" or "fails", "" while that is open. A limit is met by the upper end of the interval."""
    if found.loss == math.inf:
        return "fails"
    if goal.loss_at_most is not None:
        if found.low > goal.loss_at_most:
            return "fails"
        if found.high > goal.loss_at_most:
            return "fails" if last else ""
        if goal.minimize == "size":
            return "meets"
    if best is not None and found.low > best.high:
        return "fails"
    return "meets" if last else ""


def _best_loss(known: dict[str, Measurement], verdicts: dict[str, str]) -> Measurement | None:
    return min(
        (known[name] for name, said in verdicts.items() if said == "meets"), key=lambda one: one.loss, default=None
    )


def expected(candidates: Sequence[Candidate], known: dict[str, Measurement]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the logarithm of each candidate's loss, float64 (candidates,)."""
    prior = np.array([math.log(max(one.predicted, _FLOOR)) for one in candidates])
    # One that could not be made has an infinite loss, and teaches nothing of others.
    seen = [number for number, one in enumerate(candidates) if one.name in known and known[one.name].loss < math.inf]
    families = np.array([one.family for one in candidates])
    shared = _COMMON**2 + _FAMILY**2 * (families[:, None] == families[None, :])
    if not seen:
        return prior, np.sqrt(np.diag(shared) + _OWN**2)
    own = shared[np.ix_(seen, seen)] + _OWN**2 * np.eye(len(seen))
    off = np.array([math.log(max(known[candidates[number].name].loss, _FLOOR)) for number in seen]) - prior[seen]
    weights = np.linalg.solve(own, np.column_stack([off, shared[seen]]))
    mean = prior + shared[:, seen] @ weights[:, 0]
    variance = np.diag(shared) - np.einsum("is,si->i", shared[:, seen], weights[:, 1:]) + _OWN**2
    return mean, np.sqrt(np.maximum(variance, 1e-12))


def _next(
    fits: Sequence[Candidate], goal: Goal, known: dict[str, Measurement], verdicts: dict[str, str]
) -> Candidate | None:
    """The candidate with the largest expected gain; None if none is worth a measurement."""
    if not fits:
        return None
    mean, deviation = expected(fits, known)
    sizes = np.array([one.size for one in fits], dtype=float)
    met = [one for one in fits if verdicts.get(one.name) == "meets"]
    if goal.minimize == "size":
        best = min((one.size for one in met), default=1.01 * sizes.max())
        gain = np.maximum(best - sizes, 0.0) / best
        if goal.loss_at_most is not None:
            gain *= _below((math.log(goal.loss_at_most) - mean) / deviation)
    else:
        best_loss = _best_loss(known, verdicts)
        if best_loss is None:
            gain = _below((mean.max() + 1.0 - mean) / deviation) * (mean.max() + 1.0 - mean)
        else:
            z = (math.log(max(best_loss.loss, _FLOOR)) - mean) / deviation
            gain = deviation * (z * _below(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
        if goal.loss_at_most is not None:
            gain = gain * _below((math.log(goal.loss_at_most) - mean) / deviation)
    gain = np.where([one.name in verdicts for one in fits], 0.0, gain)
    # Where several are alike, the smaller one and then the first name.
    order = sorted(
        range(len(fits)), key=lambda number: (-round(float(gain[number]), 12), sizes[number], fits[number].name)
    )
    if gain[order[0]] > _WORTH:
        return fits[order[0]]
    # Nothing is likely to meet the goal. The likeliest is measured all the same, so that the answer rests on something.
    return None if known else min(fits, key=lambda one: (one.predicted, one.size, one.name))


def _below(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])


def _answer(
    candidates: Sequence[Candidate],
    goal: Goal,
    known: dict[str, Measurement],
    verdicts: dict[str, str],
    measured: Sequence[Measurement],
) -> Found:
    met = [one for one in candidates if verdicts.get(one.name) == "meets"]
    if goal.minimize == "size":
        best = min(met, key=lambda one: (one.size, one.name), default=None)
    else:
        best = min(met, key=lambda one: (known[one.name].loss, one.name), default=None)
    tried = [one for one in candidates if one.name in known and known[one.name].loss < math.inf]
    nearest = None if best else min(tried, key=lambda one: known[one.name].high, default=None)
    if nearest is None and best is None:
        nearest = min(candidates, key=lambda one: one.size, default=None)
    untried = {}
    for one in candidates:
        if one.name not in known:
            large = goal.size_at_most is not None and one.size > goal.size_at_most
            untried[one.name] = _TOO_LARGE if large else "not expected to be better than what was measured"
    return Found(best, nearest, verdicts, tuple(measured), tuple(front(tried, known)), untried)


def front(candidates: Sequence[Candidate], known: dict[str, Measurement]) -> Iterator[str]:
    """The measured candidates than which no other is both smaller and better, by size."""
    least = math.inf
    for one in sorted(candidates, key=lambda one: (one.size, known[one.name].loss)):
        if known[one.name].loss < least:
            least = known[one.name].loss
            yield one.name
