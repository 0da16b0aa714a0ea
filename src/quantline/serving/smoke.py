"""Check a served model: every endpoint, greedy answers to fixed prompts, speed and memory.

Faults are collected and returned together. An exception is raised only if the server does not answer, or not in time.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from quantline.core.errors import ServerError, UserError
from quantline.core.gpu import accelerator_use
from quantline.core.progress import bar
from quantline.serving import llamacpp
from quantline.serving.command import SERVED_NAME
from quantline.serving.running import Server
from quantline.serving.server_log import kernels, weights_bytes

_VLLM_COUNTERS = {"prompt": "vllm:prompt_tokens_total", "generation": "vllm:generation_tokens_total"}
COUNTER_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """A greedy answer. kind: `completion` or `chat`."""

    kind: str
    prompt: str
    text: str
    token_count: int
    finish_reason: str


@dataclass(frozen=True)
class SmokeReport:
    """The result of a smoke test.

    metrics: name with unit -> value. kernels: those of the quantized layers, as vLLM's log names them. faults: what the
    server did wrong; empty for a good one. The quality of the answers is checked by `answer_checks`.
    """

    answers: tuple[Answer, ...]
    metrics: dict[str, float]
    runtime_version: str
    kernels: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Reply:
    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    seconds: float
    first_seconds: float


def run_smoke(
    server: Server,
    prompts: Sequence[str],
    chat_prompts: Sequence[str] = (),
    *,
    max_tokens: int = 32,
    timeout_seconds: float = 120.0,
) -> SmokeReport:
    """Send every prompt twice, whole and streamed; compare the answers and measure them.

    chat_prompts: leave them empty for a model without a chat template. timeout_seconds: for one request.

    Raises:
        UserError: no prompt was given.
        ServerError: the server died, did not answer in time, or refused a request.
    """
    if not prompts:
        raise UserError("smoke prompts: none given; give at least one")
    requests = [("completion", prompt) for prompt in prompts] + [("chat", prompt) for prompt in chat_prompts]
    answers, whole, streamed, faults = [], [], [], []
    with server.client(timeout_seconds) as client, _errors_explained(server), _watched(server) as watch:
        own = server.options.runtime == llamacpp.NAME
        counters = llamacpp.COUNTERS if own else _VLLM_COUNTERS
        # llama.cpp's server in a library does not say.
        version = "" if own else str(_get(client, "/version").json().get("version", "unknown"))
        faults += _model_faults(client)
        before = _counters(client, counters)
        # The first request includes lazy initialization, so it is not timed.
        warm_up = _ask(client, "completion", prompts[0], 1)
        with bar("smoke") as progress:
            for done, (kind, prompt) in enumerate(requests):
                progress.update(done, len(requests), kind)
                whole.append(_ask(client, kind, prompt, max_tokens))
                streamed.append(_ask_streamed(client, kind, prompt, max_tokens))
                answers.append(Answer(kind, prompt, whole[-1].text, whole[-1].tokens, whole[-1].finish_reason))
                faults += _stream_faults(kind, prompt, whole[-1], streamed[-1])
            progress.update(len(requests), len(requests), "done")
        replies = [warm_up, *whole, *streamed]
        faults += _counter_faults(client, counters, before, replies)
    metrics = {
        "load_seconds": server.load_seconds,
        "time_to_first_token_seconds": statistics.median(reply.first_seconds for reply in streamed),
        "latency_seconds": statistics.median(reply.seconds for reply in whole),
        "output_tokens_per_second": sum(reply.tokens for reply in whole) / sum(reply.seconds for reply in whole),
        "rss_bytes": float(watch.rss_bytes),
    }
    log = server.log_text()
    weights = weights_bytes(log)
    if weights is not None:
        metrics["weights_bytes"] = float(weights)
    if watch.memory_bytes:
        metrics["gpu_memory_bytes"] = float(max(watch.memory_bytes))
    if watch.utilisation_percent:
        metrics["gpu_utilisation_percent"] = max(watch.utilisation_percent)
    return SmokeReport(tuple(answers), metrics, version, tuple(kernels(log)), tuple(faults))


@contextmanager
def _errors_explained(server: Server) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise server.failure(error, "answering") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ServerError(f"the server's answer cannot be read: {error!r}; log: {server.log}") from error


class _Watch:
    def __init__(self) -> None:
        self.rss_bytes = 0
        self.memory_bytes: list[int] = []
        self.utilisation_percent: list[float] = []

    def sample(self, server: Server) -> None:
        self.rss_bytes = max(self.rss_bytes, server.memory_bytes())
        if server.options.device == "cuda":
            use = accelerator_use()
            if use is not None:
                self.memory_bytes.append(use.memory_bytes)
                if use.utilisation_percent is not None:
                    self.utilisation_percent.append(use.utilisation_percent)


@contextmanager
def _watched(server: Server, every_seconds: float = 0.25) -> Iterator[_Watch]:
    """Record memory and GPU use during a `with` block."""
    watch, over = _Watch(), threading.Event()
    watch.sample(server)

    def run() -> None:
        while not over.wait(every_seconds):
            watch.sample(server)

    thread = threading.Thread(target=run, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
        watch.sample(server)


def _get(client: httpx.Client, path: str) -> httpx.Response:
    answer = client.get(path)
    if answer.status_code != httpx.codes.OK:
        raise ServerError(f"GET {path}: {answer.status_code} {answer.text[:300]}")
    return answer


def _model_faults(client: httpx.Client) -> list[str]:
    names = [card["id"] for card in _get(client, "/v1/models").json()["data"]]
    return [] if names == [SERVED_NAME] else [f"/v1/models lists {names}, expected {[SERVED_NAME]}"]


def _request(kind: str, prompt: str, max_tokens: int) -> tuple[str, dict[str, Any]]:
    common: dict[str, Any] = {"model": SERVED_NAME, "max_tokens": max_tokens, "temperature": 0}
    if kind == "chat":
        return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": prompt}]}
    return "/v1/completions", {**common, "prompt": prompt}


def _ask(client: httpx.Client, kind: str, prompt: str, max_tokens: int) -> _Reply:
    path, body = _request(kind, prompt, max_tokens)
    started = time.perf_counter()
    answer = client.post(path, json=body)
    seconds = time.perf_counter() - started
    if answer.status_code != httpx.codes.OK:
        raise ServerError(f"POST {path}: {answer.status_code} {answer.text[:300]}")
    data = answer.json()
    choice, usage = data["choices"][0], data["usage"]
    text = choice["message"]["content"] if kind == "chat" else choice["text"]
    return _Reply(
        text or "", usage["prompt_tokens"], usage["completion_tokens"], str(choice["finish_reason"]), seconds, seconds
    )


def _ask_streamed(client: httpx.Client, kind: str, prompt: str, max_tokens: int) -> _Reply:
    path, body = _request(kind, prompt, max_tokens)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    pieces: list[str] = []
    first, finish, ended = None, "", False
    usage: Mapping[str, int] = {}
    started = time.perf_counter()
    with client.stream("POST", path, json=body) as answer:
        if answer.status_code != httpx.codes.OK:
            raise ServerError(f"POST {path}: {answer.status_code} {answer.read()[:300]!r}")
        for line in answer.iter_lines():
            if not line.startswith("data:"):
                continue
            event = line.removeprefix("data:").strip()
            if event == "[DONE]":
                ended = True
                break
            data = json.loads(event)
            usage = data.get("usage") or usage
            for choice in data["choices"]:
                piece = choice["delta"].get("content") if kind == "chat" else choice["text"]
                finish = choice.get("finish_reason") or finish
                if piece or (kind == "completion" and first is None):
                    first = first or time.perf_counter() - started
                    pieces.append(piece)
    seconds = time.perf_counter() - started
    if not ended:
        raise ServerError(f"POST {path}: the stream ended early, after {len(pieces)} pieces")
    return _Reply(
        "".join(pieces), usage["prompt_tokens"], usage["completion_tokens"], finish, seconds, first or seconds
    )


def _stream_faults(kind: str, prompt: str, whole: _Reply, streamed: _Reply) -> list[str]:
    same = (whole.text, whole.tokens, whole.finish_reason) == (streamed.text, streamed.tokens, streamed.finish_reason)
    if same:
        return []
    return [
        f"{kind} {prompt!r}: streamed {streamed.text!r} ({streamed.tokens} tokens, {streamed.finish_reason}), whole "
        f"{whole.text!r} ({whole.tokens} tokens, {whole.finish_reason})"
    ]


def read_counter(metrics: str, name: str) -> float | None:
    """Sum of a counter over its labels, from Prometheus' text format; None if it is missing.

    Raises:
        ValueError: the text is not in that format.
    """
    families = text_string_to_metric_families(metrics)
    found = [sample.value for family in families for sample in family.samples if sample.name == name]
    return sum(found) if found else None


def _counters(client: httpx.Client, counters: Mapping[str, str]) -> dict[str, float | None]:
    text = _get(client, "/metrics").text
    return {what: read_counter(text, name) for what, name in counters.items()}


def _counter_faults(
    client: httpx.Client,
    counters: Mapping[str, str],
    before: Mapping[str, float | None],
    replies: Sequence[_Reply],
) -> list[str]:
    """Compare the growth of the server's counters with the tokens of its answers; the counters may lag behind."""
    expected = {
        "prompt": sum(reply.prompt_tokens for reply in replies),
        "generation": sum(reply.tokens for reply in replies),
    }
    limit = time.monotonic() + COUNTER_PATIENCE_SECONDS
    while True:
        after = _counters(client, counters)
        faults = []
        for what, tokens in expected.items():
            then, now = before[what], after[what]
            if then is None or now is None:
                faults.append(f"/metrics has no {counters[what]}")
            elif now - then != tokens:
                faults.append(f"{counters[what]} grew by {now - then:.0f}, the answers had {tokens} tokens")
        if not faults or time.monotonic() > limit:
            return faults
        time.sleep(0.2)
