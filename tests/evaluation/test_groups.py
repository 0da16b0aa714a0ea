"""The loss of each group of documents, and of the worst one."""

from __future__ import annotations

import numpy as np
import pytest
import sections

from quantline.evaluation.bootstrap import paired_bootstrap
from quantline.evaluation.groups import COLUMNS, by_group, note, worst
from quantline.evaluation.perplexity import DocumentScore, compare

HOW = sections.bootstrap(resamples=2000)


def scores(groups, extra=0.0, seed=0):
    """Documents of 10 tokens with 2 nats each; extra: nats a token that a group loses more, by its name."""
    random = np.random.default_rng(seed)
    return [
        DocumentScore(f"{group}/{number}", 20.0 + random.normal() + 10 * (extra.get(group, 0.0) if extra else 0.0), 10)
        for group, count in groups.items() for number in range(count)
    ]  # fmt: skip


def test_the_group_that_suffers_is_the_worst_one_and_the_others_lose_nothing():
    groups = {"python": 20, "rust": 30, "sql": 4}
    base, own = scores(groups), scores(groups, {"rust": 0.3, "sql": 0.9})
    rows = by_group(own, base, HOW)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [(row["group"], row["documents"], row["tokens"]) for row in rows] == [
        ("rust", 30, 300), ("python", 20, 200), ("sql", 4, 40),
    ]  # fmt: skip
    found = worst(rows)
    assert found["group"] == "rust", "the four documents of sql have no interval"
    assert found["nll_difference"] == pytest.approx(0.3)
    assert found["perplexity"] / found["float_perplexity"] == pytest.approx(np.exp(0.3))
    assert rows[1]["nll_difference"] == pytest.approx(0, abs=1e-12)
    assert (rows[2]["nll_low"], rows[2]["nll_high"]) == (None, None)


def test_the_intervals_hold_for_all_groups_together():
    groups = {"a": 20, "b": 20}
    base, own = scores(groups), scores(groups, seed=1)
    row = next(row for row in by_group(own, base, HOW) if row["group"] == "a")
    nll, floats = (np.array([one.nll_sum for one in some[:20]]) for some in (own, base))
    both = paired_bootstrap(nll, floats, np.full(20, 10.0), HOW.model_copy(update={"level": 1 - (1 - HOW.level) / 2}))
    alone = paired_bootstrap(nll, floats, np.full(20, 10.0), HOW)
    assert (row["nll_low"], row["nll_high"]) == (both.low, both.high)
    assert both.low < alone.low < alone.high < both.high


@pytest.mark.parametrize("ids", [["0", "1", "2"], ["a/0", "1", "b/2"], ["a/0", "a/1", "a/2"]])
def test_a_text_without_groups_has_no_worst_one(ids):
    some = [DocumentScore(name, 20.0, 10) for name in ids]
    assert by_group(some, some, HOW) == []
    assert worst([]) is None


def test_it_is_told_where_a_group_loses_more_than_the_whole_by_their_intervals():
    groups = {"a": 40, "b": 10}
    base, own = scores(groups), scores(groups, {"b": 0.3})
    found, whole = worst(by_group(own, base, HOW)), compare(own, base, HOW)
    assert (
        note(found, whole.high)
        == "the group b loses more than the whole text: perplexity +34.99 % [+34.99, +34.99] on 10 documents"
    )
    assert note(found, 0.31) is None
