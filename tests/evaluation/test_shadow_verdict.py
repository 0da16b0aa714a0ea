from __future__ import annotations

import math

import numpy as np
import pytest
import sections

from quantline.core.errors import UserError
from quantline.evaluation.shadow_verdict import FEWEST, judge

HOW = sections.bootstrap(resamples=2000)


def answers(requests, loss, spread=0.3, seed=0):
    """Log-probabilities of answers by the float model, and by a model that loses `loss` nats a token more."""
    random = np.random.default_rng(seed)
    floats = [-random.exponential(2.0, size=random.integers(8, 40)) for _ in range(requests)]
    return [base - loss + random.normal(0, spread, size=base.shape) for base in floats], floats


def verdict(requests, loss, **given):
    return judge(*answers(requests, loss, **given), most_increase=0.05, how=HOW)


def test_a_variant_within_the_limit_is_sound_and_one_beyond_it_is_worse():
    assert verdict(200, 0.01).verdict == "sound"
    worse = verdict(200, 0.15)
    assert worse.verdict == "worse"
    assert worse.difference.low < 0.15 < worse.difference.high
    assert worse.limit == pytest.approx(math.log(1.05))
    assert worse.as_json()["perplexity_increase"]["estimate"] == pytest.approx(math.expm1(worse.difference.estimate))


def test_a_difference_near_the_limit_or_too_few_requests_decide_nothing_and_say_how_many_would():
    near = verdict(60, math.log(1.05) + 0.004, spread=1.5)
    assert near.verdict == "undecided"
    assert near.enough > 60
    few = verdict(FEWEST - 1, 0.5)
    assert (few.verdict, few.enough) == ("undecided", FEWEST)


def test_the_number_that_it_asks_for_does_decide():
    loss = math.log(1.05) + 0.03
    first = verdict(40, loss, spread=0.8, seed=3)
    assert first.verdict == "undecided"
    assert verdict(2 * first.enough, loss, spread=0.8, seed=4).verdict == "worse"


def test_the_answers_that_lost_most_are_named():
    variant, floats = answers(30, 0.0)
    variant[7] = variant[7] - 5
    found = judge(variant, floats, most_increase=0.05, how=HOW)
    assert found.largest[0][0] == 7


def test_scores_of_different_answers_are_refused():
    variant, floats = answers(5, 0.1)
    with pytest.raises(UserError, match="different requests"):
        judge(variant[:-1], floats, most_increase=0.05, how=HOW)
    with pytest.raises(UserError, match="1 captured requests can be scored"):
        judge(variant[:1], floats[:1], most_increase=0.05, how=HOW)


def test_the_requests_that_lost_most_are_named_by_their_place_among_those_given():
    variant, other = answers(30, 0.0, spread=0.0)
    variant[20] = variant[20] - 1.0
    empty = np.array([])  # of a prompt with one token
    found = judge([empty, *variant], [empty, *other], most_increase=0.05, how=HOW)
    assert found.requests == 30
    assert found.largest[0][0] == 21
