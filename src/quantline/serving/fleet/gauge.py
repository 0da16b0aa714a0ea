"""How healthy each variant is: the process that the router asks, `python -m quantline.serving.fleet.gauge FOLDER`.

It looks at each server, the memory and the fleet's own notes, and answers `/health/VARIANT` with 200 (healthy), 200 and
`x-envoy-degraded` (others are preferred) or 503 (no requests). A state changes only after several looks that agree, so that
a variant does not swing to and fro. It is not on the way of any request: if it ends, the router asks the servers themselves.
It also exports what it sees, and what the evaluation found, at `/metrics`.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from quantline.config.fleet import HealthConfig
from quantline.core.gpu import visible_gpus
from quantline.serving import llamacpp
from quantline.serving.fleet.spec import VLLM, Fleet, Variant

HEALTHY, DEGRADED, UNHEALTHY = 0, 1, 2
LEVELS = ("healthy", "degraded", "unhealthy")
FLEET, ALARMS, STATUS = "fleet.json", "alarms.json", "status.json"
# Reasons for a state.
DOWN, STUCK, KV_CACHE, MEMORY, DRAINING, ALARM = "down", "stuck", "kv cache", "memory", "draining", "alarm"
QUEUE = "queue"
_SAMPLE = re.compile(r"^((?:vllm|llamacpp):[a-z_]+)(?:\{[^}]*\})? ([-+.0-9eEinfa]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Names:
    """A server's own names of metrics. tokens: those that move while it computes."""

    running: str
    waiting: str
    tokens: tuple[str, ...]
    kv_cache: str = ""


METRICS = {
    VLLM: Names(
        "vllm:num_requests_running", "vllm:num_requests_waiting",
        ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"), "vllm:kv_cache_usage_perc",
    ),
    # llama.cpp counts the tokens of an answer when it has ended; what moves meanwhile are its steps.
    llamacpp.NAME: Names(
        "llamacpp:requests_processing", "llamacpp:requests_deferred",
        ("llamacpp:prompt_tokens_total", "llamacpp:n_decode_total"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """One look at a server; None for what it does not say. tokens: of prompts and answers so far."""

    is_up: bool
    kv_cache: float | None = None
    running: float = 0
    waiting: float = 0
    tokens: float | None = None


@dataclass
class Watch:
    """One variant over time. `level` and `reasons` are what the looks so far say."""

    level: int = UNHEALTHY
    reasons: tuple[str, ...] = (DOWN,)
    seen: Seen = Seen(False)
    _counts: dict[str, int] = field(default_factory=dict)
    _on: set[str] = field(default_factory=set)
    _tokens: float | None = None
    _moved_at: float = 0.0

    def look(self, seen: Seen, memory: float | None, notes: frozenset[str], how: HealthConfig, now: float) -> None:
        """Take one look into account.

        Args:
            seen: of the server.
            memory: share of the memory in use; None if it does not concern this variant.
                notes: reasons that hold at once: draining, an alarm, a full queue.
            how: the limits.
            now: seconds, of a clock that does not go back.
        """
        self.seen = seen
        if seen.tokens != self._tokens or not seen.running:
            self._tokens, self._moved_at = seen.tokens, now
        is_stuck = seen.is_up and seen.tokens is not None and now - self._moved_at >= how.stuck_seconds
        self._settle(KV_CACHE, seen.kv_cache, how.kv_cache_low, how.kv_cache_high, how.looks)
        self._settle(MEMORY, memory, how.memory_low, how.memory_high, how.looks)
        worst = [DOWN] * (not seen.is_up) + [STUCK] * is_stuck
        lesser = sorted(self._on | notes)
        self.level = UNHEALTHY if worst else DEGRADED if lesser else HEALTHY
        self.reasons = (*worst, *lesser)

    def _settle(self, reason: str, value: float | None, low: float, high: float, looks: int) -> None:
        """Turn a reason on above `high` and off below `low`, each after `looks` looks in a row; between them it stays."""
        is_on = reason in self._on
        wants = value is not None and (value >= high if not is_on else value >= low)
        self._counts[reason] = self._counts.get(reason, 0) + 1 if wants != is_on else 0
        if self._counts[reason] >= looks:
            self._on ^= {reason}
            self._counts[reason] = 0


def read_metrics(text: str) -> dict[str, float]:
    """A server's metrics by name, summed over their labels."""
    found: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        with suppress(ValueError):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def ask(client: httpx.Client, variant: Variant) -> Seen:
    """One look at the server of a variant."""
    base = f"http://{variant.address}"
    try:
        if client.get(f"{base}/health").status_code != httpx.codes.OK:
            return Seen(False)
        return seen_in(client.get(f"{base}/metrics").text, variant.runtime)
    except httpx.HTTPError:
        return Seen(False)


def seen_in(text: str, runtime: str) -> Seen:
    """What the metrics of a server that answers say of it."""
    values, names = read_metrics(text), METRICS[runtime]
    counted = [values[name] for name in names.tokens if name in values]
    return Seen(
        True, values.get(names.kv_cache), values.get(names.running, 0), values.get(names.waiting, 0),
        sum(counted) if counted else None,
    )  # fmt: skip


def memory_share() -> dict[str, float]:
    """Share of the memory in use, of the machine and of each GPU."""
    found = {"host": psutil.virtual_memory().percent / 100}
    for index, gpu in enumerate(visible_gpus()):
        found[f"gpu{index}"] = gpu.memory_used_bytes / gpu.memory_total_bytes
    return found


class GaugeProcess:
    """All variants of a fleet, looked at in turns, and the answers about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = Fleet.model_validate_json((folder / FLEET).read_text(encoding="utf-8"))
        self.watches: dict[str, Watch] = {}
        self.memory: dict[str, float] = {}
        self.looked_at = time.monotonic()
        self.metrics = b""  # of the last look, whole: they are counted anew at each
        self._registry = CollectorRegistry()
        label = ["variant"]

        def gauge(name: str, about: str, labels: list[str]) -> Gauge:
            return Gauge(f"quantline_{name}", about, labels, registry=self._registry)

        self._gauges = {
            "state": gauge("variant_state", "0 healthy, 1 degraded, 2 unhealthy", label),
            "reason": gauge("variant_reason", "1 for each reason of a state", [*label, "reason"]),
            "running": gauge("variant_requests_running", "Requests that a variant computes", label),
            "waiting": gauge("variant_requests_waiting", "Requests that wait in a variant", label),
            "kv_cache": gauge("variant_kv_cache_ratio", "Share of the KV cache in use", label),
            "weights": gauge("variant_weight_bytes", "Size of a variant's weights", label),
            "error": gauge(
                "variant_perplexity_increase_ratio",
                "Quantization error: relative to the float model, as evaluated",
                label,
            ),
            "alarms": gauge("variant_evaluation_alarms", "Alarms of a variant's evaluation", label),
            "starts": gauge("variant_starts", "How often a variant's server was started", label),
            "memory": gauge("memory_used_ratio", "Share of the memory in use", ["device"]),
        }
        self._looks = Counter("quantline_gauge_looks", "Looks at all variants", registry=self._registry)

    def look(self, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
        """Look at every variant once."""
        with suppress(OSError, ValueError):  # the file is moved into place; an old one is still right
            self.fleet = Fleet.model_validate_json((self.folder / FLEET).read_text(encoding="utf-8"))
        self.memory = memory_share()
        fullest = max((share for device, share in self.memory.items() if device != "host"), default=None)
        fullest = self.memory["host"] if fullest is None else fullest
        alarms, variants = _notes(self.folder / ALARMS), self.fleet.variants
        smallest = min((variant.weight_bytes for variant in variants), default=0)
        for variant, seen in zip(variants, pool.map(lambda one: ask(client, one), variants), strict=True):
            notes = {DRAINING} & ({DRAINING} if variant.name in self.fleet.draining else set())
            notes |= {ALARM} if variant.name in alarms else set()
            most = variant.queued_requests
            notes |= {QUEUE} if most is not None and seen.running + seen.waiting >= most else set()
            concerned = fullest if variant.weight_bytes > smallest else None
            watch = self.watches.setdefault(variant.name, Watch())
            watch.look(seen, concerned, frozenset(notes), self.fleet.health, time.monotonic())
        for gone in set(self.watches) - {variant.name for variant in variants}:
            del self.watches[gone]
        self.looked_at = time.monotonic()
        self._export()

    def _export(self) -> None:
        for gauge in self._gauges.values():
            gauge.clear()
        starts = _notes(self.folder / STATUS)
        for variant in self.fleet.variants:
            name, watch = variant.name, self.watches[variant.name]
            self._gauges["state"].labels(name).set(watch.level)
            for reason in watch.reasons:
                self._gauges["reason"].labels(name, reason).set(1)
            values = {
                "running": watch.seen.running, "waiting": watch.seen.waiting, "kv_cache": watch.seen.kv_cache,
                "weights": variant.weight_bytes, "error": variant.perplexity_increase, "alarms": variant.alarms,
                "starts": (starts.get(name) or {}).get("starts"),
            }  # fmt: skip
            for key, value in values.items():
                if value is not None:
                    self._gauges[key].labels(name).set(value)
        for device, share in self.memory.items():
            self._gauges["memory"].labels(device).set(share)
        self._looks.inc()
        self.metrics = generate_latest(self._registry)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        if path == "/metrics":
            return 200, {"content-type": "text/plain; version=0.0.4"}, self.metrics
        if path == "/alive":
            # Looks that no longer come are as bad as no answer.
            is_late = time.monotonic() - self.looked_at > 10 * self.fleet.health.interval_seconds + 5
            return (503 if is_late else 200), {}, b""
        if path == "/state":
            return 200, {"content-type": "application/json"}, json.dumps(self.state()).encode()
        watch = self.watches.get(path.removeprefix("/health/"))
        if watch is None:
            return 404, {}, b"no such variant\n"
        headers = {"x-envoy-degraded": "1"} if watch.level == DEGRADED else {}
        return (503 if watch.level == UNHEALTHY else 200), headers, f"{', '.join(watch.reasons)}\n".encode()

    def state(self) -> dict[str, Any]:
        """What is known of each variant, and the memory in use."""
        return {
            "memory": self.memory,
            "variants": {
                name: {
                    "level": LEVELS[watch.level], "reasons": list(watch.reasons), "running": watch.seen.running,
                    "waiting": watch.seen.waiting, "kv_cache": watch.seen.kv_cache,
                }
                for name, watch in list(self.watches.items())
            },
        }  # fmt: skip


def _notes(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main(folder: Path) -> None:
    """Serve until SIGTERM."""
    gauge = GaugeProcess(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = gauge.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: there are several requests a second."""

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    assert gauge.fleet.gauge_port is not None
    with httpx.Client(timeout=2.0, trust_env=False) as client, ThreadPoolExecutor(8) as pool:
        gauge.look(client, pool)  # so that the first answer is true
        server = ThreadingHTTPServer(("127.0.0.1", gauge.fleet.gauge_port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while not stop.wait(gauge.fleet.health.interval_seconds):
            gauge.look(client, pool)
        server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
