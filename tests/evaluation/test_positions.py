from __future__ import annotations

import numpy as np
import pytest
import sections

from quantline.data.windows import Windows
from quantline.evaluation.positions import COLUMNS, by_position

HOW = sections.bootstrap(resamples=500)


def windows(lengths):
    count = len(lengths)
    return Windows(
        np.zeros(sum(lengths), np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.arange(count, dtype=np.int32), np.ones(count, np.int32), tuple(map(str, range(count))), {},
    )  # fmt: skip


def test_a_loss_far_into_the_window_shows_in_its_range_alone():
    text = windows([40] * 6 + [20] * 3)
    place = np.concatenate([np.arange(40)] * 6 + [np.arange(20)] * 3)
    base = np.full(len(place), -2.0)
    own = np.where(place >= 32, -2.5, base)
    near, middle, far = by_position(text, own, base, HOW)
    assert all(tuple(row) == COLUMNS for row in (near, middle, far))
    assert [(row["first"], row["last"]) for row in (near, middle, far)] == [(1, 15), (16, 31), (32, 39)]
    assert [row["documents"] for row in (near, middle, far)] == [9, 9, 6]
    assert (near["tokens"], middle["tokens"], far["tokens"]) == (9 * 15, 6 * 16 + 3 * 4, 6 * 8)
    assert near["nll_difference"] == middle["nll_difference"] == 0
    assert far["nll_difference"] == pytest.approx(0.5)
    assert far["perplexity"] / far["float_perplexity"] == pytest.approx(np.exp(0.5))
    assert far["nll_low"] == pytest.approx(0.5)


def test_only_scored_tokens_count_and_one_document_has_no_interval():
    text = windows([20, 10])
    text.context[0] = 18
    (near, late) = by_position(text, np.full(30, -1.0), np.full(30, -1.0), HOW)
    assert (near["documents"], near["tokens"], near["nll_low"]) == (1, 9, None)
    assert (late["documents"], late["tokens"]) == (1, 2)
