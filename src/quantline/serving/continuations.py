"""Greedy continuations of token ids by a running server, for models that the reference engine would read once a token.

`generations.json` in the output of serve_smoke has the `prompts` (lists of token ids), `tokens` (the continuations),
`margins` (how far each token is above the runner-up, in nats) and `engine`, the server's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from quantline.core.errors import ServerError
from quantline.core.progress import bar
from quantline.serving.command import SERVED_NAME
from quantline.serving.running import Server

FILE = "generations.json"


def continue_greedily(
    server: Server, prompts: Sequence[Sequence[int]], new_tokens: int, *, concurrency: int, timeout_seconds: float
) -> dict[str, Any]:
    """The most likely token at each step, whatever it is: stop tokens do not stop it.

    Args:
        prompts: lists of token ids.
        concurrency: requests at a time. timeout_seconds: for one request.

    Returns:
        `prompts`, `tokens` and `margins`, as in the file.

    Raises:
        ServerError: the server died or did not answer in time, or its answer cannot be read.
    """
    client = server.client(timeout_seconds, connections=concurrency)

    def ask(prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        return _one(client, list(prompt), new_tokens)

    found: list[tuple[list[int], list[float]]] = []
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="continuing")
    try:
        with client, bar("continuing prompts through the server") as progress:
            for answer in pool.map(ask, prompts):
                found.append(answer)
                progress.update(len(found), len(prompts), "prompts")
    except httpx.HTTPError as error:
        raise server.failure(error, "continuing prompts") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return {
        "prompts": [list(prompt) for prompt in prompts], "tokens": [tokens for tokens, _ in found],
        "margins": [margins for _, margins in found],
    }  # fmt: skip


def _one(client: httpx.Client, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    request = {
        "model": SERVED_NAME, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 2, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
    }  # fmt: skip
    answer = client.post("/v1/completions", json=request)
    if answer.status_code != httpx.codes.OK:
        raise ServerError(f"the server refused a prompt of {len(prompt)} tokens: {answer.text[:500]}")
    try:
        (choice,) = answer.json()["choices"]
        return read_choice(choice, new_tokens)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"the server's continuation of a prompt cannot be read: {error!r}") from error


def read_choice(choice: Mapping[str, Any], new_tokens: int) -> tuple[list[int], list[float]]:
    """Token ids and their margins, in one choice of a response whose tokens are written `token_id:N`.

    Raises:
        ServerError: there are more or fewer tokens than were asked for, or a margin is no number.
        KeyError, ValueError, TypeError, AttributeError: the choice has another structure.
    """
    told = choice["logprobs"]
    tokens = [int(token.removeprefix("token_id:")) for token in told["tokens"]]
    if len(tokens) != new_tokens:
        raise ServerError(f"the server continued a prompt by {len(tokens)} tokens instead of {new_tokens}")
    margins = []
    for likeliest in told["top_logprobs"]:
        first, second, *_ = sorted(likeliest.values(), reverse=True)
        if not math.isfinite(first - second):
            raise ServerError(f"the server gave {first} and {second} as log-probabilities of its two likeliest tokens")
        margins.append(round(float(first - second), 6))
    return tokens, margins
