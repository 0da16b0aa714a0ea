"""The search with a simulated judge whose truth is known: few measurements, near the optimum, the same again."""

from __future__ import annotations

import numpy as np
import pytest

from quantline.planning.search import Candidate, Goal, Measurement, expected, search

SHARES = (0.125, 0.25, 0.5, 1.0)


class World:
    """Candidates of three methods at 20 sizes each, whose losses are off their predictions."""

    def __init__(self, seed, noise=0.001):
        random = np.random.default_rng(seed)
        self.noise, self.asked = noise, []
        common, methods = random.normal(0, 0.5), {name: random.normal(0, 0.3) for name in ("a", "b", "c")}
        self.candidates, self.truth = [], {}
        for family, factor in methods.items():
            for step in range(20):
                bits = 3.1 + 0.25 * step
                predicted = 3.0 * 4.0 ** (3 - bits) * 0.05
                name = f"{family}{step}"
                self.candidates.append(
                    Candidate(name, (name,), int(bits * 1e8) + random.integers(0, 100), predicted, family)
                )
                self.truth[name] = float(np.exp(np.log(predicted) + common + factor + random.normal(0, 0.1)))

    def judge(self, one, share):
        self.asked.append((one.name, share))
        deviation = self.noise / np.sqrt(SHARES[share])
        shift = np.random.default_rng([int(one.size) % 2**31, share]).normal(0, deviation / 2)
        loss = self.truth[one.name] + shift
        return Measurement(one.name, share, loss, loss - 2 * deviation, loss + 2 * deviation)

    def run(self, goal, most=60):
        self.asked = []
        return search(self.candidates, goal, self.judge, shares=len(SHARES), most=most)


@pytest.mark.parametrize("limit", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_that_meets_a_loss_is_found_with_a_fifth_of_the_grid(seed, limit):
    world = World(seed)
    found = world.run(Goal("size", loss_at_most=limit))
    # The grid measures everything on all documents.
    everything = [world.judge(one, 3) for one in world.candidates]
    sizes = {one.name: one.size for one in world.candidates}
    optimum = min(sizes[one.candidate] for one in everything if one.high <= limit)
    assert found.best is not None
    assert found.best.size <= 1.02 * optimum
    assert len({one.candidate for one in found.measurements}) <= len(world.candidates) / 5
    # A larger share goes on from the smaller one.
    documents = sum(SHARES[share] for share in {one.candidate: one.share for one in found.measurements}.values())
    assert documents <= len(world.candidates) / 5
    assert world.truth[found.best.name] <= limit


@pytest.mark.parametrize("seed", range(4))
def test_the_best_within_a_size_is_found(seed):
    world = World(seed)
    goal = Goal("loss", size_at_most=int(5e8))
    found = world.run(goal)
    best = min((one for one in world.candidates if one.size <= 5e8), key=lambda one: world.truth[one.name])
    assert world.truth[found.best.name] <= world.truth[best.name] + 2 * world.noise
    assert len(found.verdicts) <= len(world.candidates) / 5
    assert all(found.untried[one.name] == "too large" for one in world.candidates if one.size > 5e8)


def test_the_same_measurements_give_the_same_search_and_a_journal_resumes_it():
    world = World(1)
    first = world.run(Goal("size", loss_at_most=0.02))
    asked = list(world.asked)
    again = world.run(Goal("size", loss_at_most=0.02))
    assert (again, world.asked) == (first, asked)


def test_a_goal_that_nothing_meets_is_answered_with_the_nearest():
    world = World(2)
    found = world.run(Goal("size", loss_at_most=1e-5))
    assert found.best is None
    assert found.nearest is not None
    assert 0 < len(found.verdicts) < 10
    both = world.run(Goal("size", loss_at_most=1e-6, size_at_most=int(3.6e8)))
    assert both.best is None
    assert list(both.verdicts) == [both.nearest.name]
    none = world.run(Goal("size", loss_at_most=0.01, size_at_most=1000))
    assert (none.best, none.measurements) == (None, ())
    assert none.nearest == min(world.candidates, key=lambda one: one.size)


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_confirmed_on_all_documents_and_dropped_if_it_fails_there(seed):
    world = World(seed)
    honest = world.judge

    def flattering(one, share):
        found = honest(one, share)
        if share < len(SHARES) - 1:  # few documents make every candidate look half as bad
            return Measurement(one.name, share, found.loss / 2, found.low / 2, found.high / 2)
        return found

    found = search(world.candidates, Goal("size", loss_at_most=0.03), flattering, shares=len(SHARES), most=60)
    last = {one.candidate: one for one in found.measurements}[found.best.name]
    assert last.share == len(SHARES) - 1
    assert world.truth[found.best.name] <= 0.03


def test_what_cannot_be_made_fails_at_once_and_is_no_answer():
    world = World(5)
    honest, broken = world.judge, {one.name for one in world.candidates if one.family == "a"}

    def judge(one, share):
        infinite = float("inf")
        return Measurement(one.name, share, infinite, infinite, infinite) if one.name in broken else honest(one, share)

    for goal in (Goal("loss", size_at_most=int(5e8)), Goal("size", loss_at_most=0.03)):
        found = search(world.candidates, goal, judge, shares=len(SHARES), most=60)
        assert found.best.name not in broken
        assert all(found.verdicts[name] == "fails" for name in broken & set(found.verdicts))
        asked = [one.candidate for one in found.measurements if one.candidate in broken]
        assert len(asked) == len(set(asked))


def test_what_surely_fails_is_dropped_on_the_smallest_share():
    world = World(3)
    world.run(Goal("size", loss_at_most=0.03))
    last = dict(world.asked)
    assert min(last.values()) == 0


def test_a_measurement_teaches_of_the_method_and_of_all():
    world = World(0)
    mean, deviation = expected(world.candidates, {})
    known = {"a5": Measurement("a5", 3, 4 * world.candidates[5].predicted, 0, 0)}
    after, narrower = expected(world.candidates, known)
    gained = after - mean
    assert gained[5] == pytest.approx(gained[6])
    assert 0 < gained[25] < gained[6] < np.log(4)
    assert (narrower < deviation).all()


def test_the_front_has_what_nothing_else_beats():
    world = World(4)
    found = world.run(Goal("size", loss_at_most=0.02))
    sizes = {one.name: one.size for one in world.candidates}
    assert [sizes[name] for name in found.front] == sorted(sizes[name] for name in found.front)
    assert found.best.name in found.front or len(found.front) < len(found.verdicts)


def test_what_was_left_because_enough_was_measured_says_so():
    world = World(0)
    found = world.run(Goal("loss", size_at_most=int(5e8)), most=2)
    assert len(found.verdicts) == 2
    assert set(found.untried.values()) == {"too large", "2 candidates were measured before"}
    assert all(
        (one.size > 5e8) == (found.untried[one.name] == "too large")
        for one in world.candidates
        if one.name in found.untried
    )
