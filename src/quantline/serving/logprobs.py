"""Log-probabilities of given tokens, from a running server.

A window of token ids is sent as the prompt of a completion with `prompt_logprobs: 0`, which returns the log-probability
of each prompt token and no alternatives (one alternative took 1.5 times as long, five took twice as long). They are
natural logarithms of the softmax before any sampling rule. The server generates at least one token for each request, so
a window must be at least one token shorter than `max_model_len`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from quantline.core.errors import ServerError, UserError
from quantline.core.progress import bar
from quantline.serving.command import SERVED_NAME
from quantline.serving.running import Server

# vLLM writes minus infinity as this, since JSON cannot express it.
MINUS_INFINITY = -9999.0


def score(
    server: Server,
    windows: Sequence[Sequence[int] | NDArray[np.integer[Any]]],
    *,
    concurrency: int = 8,
    timeout_seconds: float = 300.0,
    label: str = "scoring through the server",
) -> list[NDArray[np.float64]]:
    """Natural log-probability of each window's tokens except the first, given the tokens before.

    concurrency: requests at a time; 8 were as fast as 16. timeout_seconds: for one request.

    Raises:
        UserError: a window has fewer than two tokens, or more than the server takes.
        ServerError: the server died or did not answer in time, scored other tokens than were sent, or returned a
            value that is not a log-probability.
    """
    prompts = [[int(token) for token in window] for window in windows]
    longest = server.max_model_len - 1
    for index, prompt in enumerate(prompts):
        if not 2 <= len(prompt) <= longest:
            raise UserError(
                f"window {index} has {len(prompt)} tokens; allowed are 2 to {longest}, one less than the server's "
                f"max_model_len={server.max_model_len}"
            )
    client = server.client(timeout_seconds, connections=concurrency)

    def ask(prompt: list[int]) -> NDArray[np.float64]:
        return _score_one(client, prompt)

    with client:
        return _in_parallel(server, ask, prompts, concurrency, label)


def _in_parallel(
    server: Server,
    ask: Callable[[list[int]], NDArray[np.float64]],
    prompts: list[list[int]],
    concurrency: int,
    label: str,
) -> list[NDArray[np.float64]]:
    results: dict[int, NDArray[np.float64]] = {}
    total = sum(map(len, prompts))
    done = 0
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="scoring")
    try:
        with bar(label) as progress:
            waiting = {pool.submit(ask, prompt): index for index, prompt in enumerate(prompts)}
            for future in as_completed(waiting):
                index = waiting[future]
                results[index] = future.result()
                done += len(prompts[index])
                progress.update(done, total, "tokens")
    except httpx.HTTPError as error:
        raise server.failure(error, "scoring") from error
    finally:
        # Do not wait: a request that hangs ends when its connection closes, at the latest with the server.
        pool.shutdown(wait=False, cancel_futures=True)
    return [results[index] for index in range(len(prompts))]


def _score_one(client: httpx.Client, prompt: list[int]) -> NDArray[np.float64]:
    request = {
        "model": SERVED_NAME,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    answer = client.post("/v1/completions", json=request)
    if answer.status_code != httpx.codes.OK:
        raise ServerError(f"the server refused a window of {len(prompt)} tokens: {answer.text[:500]}")
    try:
        (choice,) = answer.json()["choices"]
        return read_choice(choice, prompt)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"the server's response to a window cannot be read: {error!r}") from error


def read_choice(choice: dict[str, Any], prompt: list[int]) -> NDArray[np.float64]:
    """The log-probabilities in one choice of a response.

    Raises:
        ServerError: they are of other tokens than `prompt`, or not all of them are finite and at most 0.
        KeyError, ValueError, TypeError, AttributeError: the choice has another structure.
    """
    if choice["prompt_token_ids"] != prompt:
        raise ServerError("the server scored other tokens than it was sent")
    first, *entries = choice["prompt_logprobs"]
    if first is not None or len(entries) != len(prompt) - 1:
        raise ServerError(f"the server gave {len(entries)} log-probabilities for a window of {len(prompt)} tokens")
    values = np.empty(len(entries), dtype=np.float64)
    for index, (token, entry) in enumerate(zip(prompt[1:], entries, strict=True)):
        if str(token) not in entry:
            raise ServerError(f"the server gave no log-probability for token {token} at position {index + 1}")
        value = float(entry[str(token)]["logprob"])
        if not math.isfinite(value) or value > 1e-4 or value <= MINUS_INFINITY:
            raise ServerError(f"the server gave {value} as log-probability of token {token} at position {index + 1}")
        values[index] = min(value, 0.0)
    return values
