from __future__ import annotations

import time

import numpy as np
import pytest

from quantline.core.errors import ServerError, UserError
from quantline.serving.logprobs import read_choice, score


def test_each_window_gets_its_own_scores_in_its_place_whatever_finishes_first(start):
    windows = [[1, first, 3 + first % 7] for first in range(40)]
    with start() as server:
        scores = score(server, windows, concurrency=8)
        assert score(server, [], concurrency=2) == []
    for window, found in zip(windows, scores, strict=True):
        np.testing.assert_allclose(found, [-token / 10 for token in window[1:]])
        assert found.dtype == np.float64


def test_arrays_of_token_ids_are_windows_too(start):
    with start() as server:
        (found,) = score(server, [np.array([5, 6, 7], dtype=np.int32)])
    np.testing.assert_allclose(found, [-0.6, -0.7])


def test_a_window_that_cannot_be_scored_is_refused_before_any_request(start):
    with start() as server:
        for length in (0, 1, 16):
            with pytest.raises(UserError, match=f"window 1 has {length} tokens; allowed are 2 to 15"):
                score(server, [[1, 2], [3] * length])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("scores_other_tokens", "scored other tokens than it was sent"),
        ("dies_on_answers", "ended with code 5 while scoring: RuntimeError: out of ideas"),
        ("refuses", "refused a window of 3 tokens: .*not today"),
        ("not_json", "cannot be read"),
    ],
)
def test_an_answer_that_cannot_be_accepted_is_an_error(start, fault, says):
    with start(fault) as server, pytest.raises(ServerError, match=says):
        score(server, [[1, 2, 3]] * 5, concurrency=2)


def test_a_server_that_hangs_is_given_up(start):
    began = time.monotonic()
    with (
        start("hangs_on_answers") as server,
        pytest.raises(ServerError, match="did not answer /v1/completions in time"),
    ):
        score(server, [[1, 2, 3]] * 20, concurrency=4, timeout_seconds=0.5)
    assert time.monotonic() - began < 20


def choice(values, ids=(1, 2, 3)):
    entries = [None, *({str(token): {"logprob": value}} for token, value in zip(ids[1:], values, strict=True))]
    return {"prompt_token_ids": list(ids), "prompt_logprobs": entries}


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -9999.0, 0.5])
def test_a_value_that_is_no_log_probability_is_refused(value):
    with pytest.raises(ServerError, match="as log-probability of token 3 at position 2"):
        read_choice(choice([-1.0, value]), [1, 2, 3])


def test_a_missing_value_is_refused():
    with pytest.raises(ServerError, match="no log-probability for token 2"):
        read_choice(choice([-1.0, -1.0], (1, 7, 3)) | {"prompt_token_ids": [1, 2, 3]}, [1, 2, 3])
    short = {"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None, {"2": {"logprob": -1.0}}]}
    with pytest.raises(ServerError, match="1 log-probabilities for a window of 3 tokens"):
        read_choice(short, [1, 2, 3])


def test_a_rounding_above_zero_counts_as_zero():
    np.testing.assert_array_equal(read_choice(choice([1e-7, -2.0]), [1, 2, 3]), [0.0, -2.0])
