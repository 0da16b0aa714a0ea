from __future__ import annotations

import math
from pathlib import Path

import pytest

from quantline.evaluation.evaluate import Verdict
from quantline.evaluation.seed_noise import SeededRun, measure, spread


def run(seed, change, output="a"):
    return SeededRun(seed, math.log1p(change), change, 0.9, output)


def test_the_spread_is_the_standard_deviation_of_the_runs_changes():
    found = spread([run(0, 0.02), run(1, 0.04, "b"), run(2, 0.03)])
    assert found.mean == pytest.approx(0.03)
    assert found.deviation == pytest.approx(0.01)
    assert (found.low, found.high, found.distinct_outputs) == (0.02, 0.04, 2)
    assert found.metrics["perplexity_change_std"] == pytest.approx(0.01)


def test_one_run_has_no_spread():
    with pytest.raises(ValueError, match="1 runs have no spread"):
        spread([run(0, 0.02)])


def test_every_seed_is_made_and_judged_once():
    made, judged = [], []

    def make(seed):
        made.append(seed)
        return Path(f"seed{seed}"), f"hash{seed}"

    def judge(checkpoint):
        judged.append(checkpoint.name)
        return Verdict({"nll_difference": 0.01 * len(judged), "top1_agreement": 0.9}, "worse")

    found = measure(range(3, 6), make, judge)
    assert (made, judged) == ([3, 4, 5], ["seed3", "seed4", "seed5"])
    assert [one.output_hash for one in found.runs] == ["hash3", "hash4", "hash5"]
    assert found.runs[0].perplexity_change == pytest.approx(math.expm1(0.01))
