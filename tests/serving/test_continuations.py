from __future__ import annotations

import pytest

from quantline.core.errors import ServerError
from quantline.serving.continuations import continue_greedily, read_choice


def test_each_prompt_gets_its_own_continuation_with_the_margins_of_its_tokens(start):
    prompts = [[1, 10 * number] for number in range(1, 9)]
    with start() as server:
        found = continue_greedily(server, prompts, 3, concurrency=4, timeout_seconds=20)
    assert found["prompts"] == prompts
    assert found["tokens"] == [[10 * number + place for place in (1, 2, 3)] for number in range(1, 9)]
    assert found["margins"] == [[1.0, 2.0, 3.0]] * 8


@pytest.mark.parametrize(
    ("fault", "says"),
    [("refuses", "refused a prompt of 2 tokens"), ("not_json", "cannot be read"),
     ("counts_wrongly", "by 2 tokens instead of 3"), ("dies_on_answers", "out of ideas")],
)  # fmt: skip
def test_an_answer_that_cannot_be_taken_is_an_error(start, fault, says):
    with pytest.raises(ServerError, match=says), start(fault) as server:
        continue_greedily(server, [[1, 2]], 3, concurrency=1, timeout_seconds=20)


def test_a_margin_that_is_no_number_is_refused():
    told = {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": float("nan"), "token_id:6": -1.0}]}
    with pytest.raises(ServerError, match="log-probabilities of its two likeliest"):
        read_choice({"logprobs": told}, 1)
