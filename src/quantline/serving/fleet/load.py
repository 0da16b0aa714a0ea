"""A load on an endpoint, and what became of each request: who answered, after how many attempts, and what was lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

LOST, BROKEN, QUIET = "lost", "broken", "quiet"


@dataclass(frozen=True)
class Load:
    """What is asked.

    streamed: share of the requests whose answer is streamed. max_tokens: of an answer. least_seconds: more requests than
    `requests` are sent until the load has lasted for so long.
    """

    url: str
    model: str
    requests: int
    concurrency: int = 8
    streamed: float = 0.0
    max_tokens: int = 8
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = 120.0
    completions: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    least_seconds: float = 0.0


@dataclass
class Outcome:
    """What became of a load.

    lost: requests that got no answer, or an error, before the first byte. broken: streams that ended with an error after it.
    quiet: streams that ended without one and without their end. seconds: of each request that was answered.
    """

    requests: int = 0
    lost: int = 0
    broken: int = 0
    quiet: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    variants: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0

    @property
    def retried(self) -> int:
        """Requests that another variant had to answer."""
        return sum(count for attempts, count in self.attempts.items() if attempts.isdecimal() and int(attempts) > 1)

    def quantile(self, share: float) -> float:
        """Of the seconds; 0 without answers."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def run(load: Load, during: Callable[[], object] | None = None, after: float = 0.25) -> Outcome:
    """Send the requests, `load.concurrency` at a time.

    during: runs in a thread of its own once the share `after` of the requests was sent; its exceptions are raised here.
    """
    return asyncio.run(_run(load, during, after))


async def _run(load: Load, during: Callable[[], object] | None, after: float) -> Outcome:
    outcome, event = Outcome(), asyncio.Event()
    limits = httpx.Limits(max_connections=load.concurrency, max_keepalive_connections=load.concurrency)
    started = time.perf_counter()

    def more() -> Iterator[int]:
        while outcome.requests < load.requests or time.perf_counter() - started < load.least_seconds:
            outcome.requests += 1
            yield outcome.requests - 1

    numbers = more()
    async with httpx.AsyncClient(
        base_url=load.url, timeout=load.timeout_seconds, limits=limits, trust_env=False, headers=dict(load.headers),
        verify=False,  # noqa: S501 (a test load to this machine; the certificate may be its own)
    ) as client:  # fmt: skip

        async def work() -> None:
            for number in numbers:
                if number >= load.requests * after:
                    event.set()
                await _one(client, load, number, outcome)

        async def act() -> None:
            if during is not None:
                await event.wait()
                await asyncio.get_running_loop().run_in_executor(None, during)

        await asyncio.gather(act(), *(work() for _ in range(load.concurrency)))
    outcome.wall_seconds = time.perf_counter() - started
    return outcome


async def _one(client: httpx.AsyncClient, load: Load, number: int, outcome: Outcome) -> None:
    # Evenly spread, so that a share of a half is every second one.
    is_streamed = int((number + 1) * load.streamed) > int(number * load.streamed)
    text = f"Request {number}: what is an index?"
    asked: dict[str, Any] = {"prompt": text} if load.completions else {"messages": [{"role": "user", "content": text}]}
    body = {"model": load.model, **asked, "max_tokens": load.max_tokens, "stream": is_streamed, **load.extra}
    path = "/v1/completions" if load.completions else "/v1/chat/completions"
    started, has_begun = time.perf_counter(), False
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                outcome.lost += 1
                outcome.errors[f"{answer.status_code}"] += 1
                return
            has_begun, last = True, ""
            parts = []
            async for line in answer.aiter_lines():
                if line.strip():
                    last = line
                    parts.append(line)
            if is_streamed and last.strip() != "data: [DONE]":
                outcome.quiet += 1
                return
            if not is_streamed:
                json.loads("\n".join(parts))
            outcome.variants[answer.headers.get("x-quantline-variant", "?")] += 1
            outcome.attempts[answer.headers.get("x-quantline-attempts", "?")] += 1
            outcome.reasons[answer.headers.get("x-quantline-reason", "?")] += 1
            outcome.seconds.append(time.perf_counter() - started)
    except (httpx.HTTPError, ValueError) as error:
        outcome.errors[type(error).__name__] += 1
        if has_begun and is_streamed:
            outcome.broken += 1
        else:
            outcome.lost += 1
