"""The fault drill: a load on a running fleet while something goes wrong, and how many requests that cost.

The faults of `FAKED` need servers that have them on order. Those of `REAL` can be done to any server.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

import httpx
import psutil

from quantline.config.fleet import ShareConfig
from quantline.serving.fleet import gauge
from quantline.serving.fleet.child import wait_until
from quantline.serving.fleet.load import Load, Outcome, run
from quantline.serving.fleet.running import RunningFleet

KILL, HANG, QUEUE, RELOAD, CANARY, DRAIN = "kill -9", "hang", "queue full", "reload", "canary moved", "drain"
GAUGE = "gauge killed"
REAL = (KILL, HANG, QUEUE, RELOAD, CANARY, DRAIN, GAUGE)
FLOODS = ("500", "429", "503")
FAKED = (KILL, HANG, *FLOODS, RELOAD, CANARY, DRAIN, GAUGE)
AGAIN_SECONDS = 120.0


@dataclass(frozen=True)
class Row:
    """What one fault cost.

    p50_seconds, p99_seconds: of requests that were answered. back_seconds: from the end of the load until the variant with
    the fault answers again; None if it did not. The rest is as in `load.Outcome`.
    """

    fault: str
    requests: int
    lost: int
    broken: int
    quiet: int
    retried: int
    elsewhere: int
    p50_seconds: float
    p99_seconds: float
    back_seconds: float | None
    errors: dict[str, int]


@dataclass(frozen=True)
class Drill:
    """A drill on the first variant of a precision.

    on_order: sets a fault of a fake server by the variant's name; None where the servers are real. again_seconds: to wait
    for everything to be healthy before the next fault. queue_concurrency: requests at a time that fill the first variant's
    queue, for the fault `QUEUE`.
    """

    running: RunningFleet
    load: Load
    on_order: Callable[[str, str], None] | None = None
    again_seconds: float = AGAIN_SECONDS
    queue_concurrency: int = 12

    @property
    def target(self) -> str:
        """The variant that the faults are done to."""
        return self.running.fleet.precisions[self.load.model][0]

    def rows(self, faults: tuple[str, ...] = REAL) -> Iterator[Row]:
        """Run the faults one after the other; before each, everything is healthy again."""
        for fault in faults:
            self._await_healthy()
            full = fault == QUEUE
            load = replace(self.load, concurrency=self.queue_concurrency) if full else self.load
            outcome = run(load, partial(self._do, fault))
            self._undo(fault)
            yield row(fault, outcome, self.target, self._seconds_until_back())

    def _do(self, fault: str) -> None:
        if fault == KILL:
            self._signal(signal.SIGKILL)
        elif fault == HANG and self.on_order is None:
            self._signal(signal.SIGSTOP)
        elif fault in (*FLOODS, HANG) and self.on_order is not None:
            self.on_order(self.target, fault)
        elif fault == GAUGE:
            pid = self.running.gauge.pid if self.running.gauge is not None else None
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            for _ in range(10):
                self.running.step()
                time.sleep(0.1)
        elif fault == RELOAD:
            for _ in range(5):
                self._change()
        elif fault == CANARY:
            other = self.running.fleet.precisions[self.load.model][-1]
            for share in (0.1, 0.5, 1.0, 0.0):
                canary = ShareConfig(precision=self.load.model, variant=other, share=share)
                self._change(canary=canary if share else ShareConfig())
                time.sleep(0.2)  # some requests at each share
        elif fault == DRAIN:
            self._change(draining=(self.target,))

    def _undo(self, fault: str) -> None:
        if fault == HANG and self.on_order is None:
            self._signal(signal.SIGCONT)
        elif fault in (*FLOODS, HANG) and self.on_order is not None:
            self.on_order(self.target, "")
        elif fault == DRAIN:
            self._change(draining=())

    def _change(self, **changes: object) -> None:
        fleet = self.running.fleet
        self.running.change(fleet.model_copy(update={"generation": fleet.generation + 1, **changes}))

    def _signal(self, number: signal.Signals) -> None:
        server = self.running.keepers[self.target].server
        for process in server.processes() if server is not None else []:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _seconds_until_back(self) -> float | None:
        """Wait until the first variant answers again."""
        began = time.monotonic()

        def is_back() -> bool:
            self.running.step()
            return self._answers()

        return time.monotonic() - began if wait_until(is_back, self.again_seconds, 0.2) else None

    def _answers(self) -> bool:
        """Whether the first variant answers requests for the precision."""
        asked = replace(self.load, requests=3, concurrency=1, max_tokens=1, streamed=0.0, least_seconds=0.0)
        return run(asked).variants == {self.target: 3}

    def _await_healthy(self) -> None:
        """Wait until every server runs and the router prefers the first again."""
        fleet = self.running.fleet

        def is_healthy() -> bool:
            self.running.step()
            if not all(keeper.server is not None for keeper in self.running.keepers.values()):
                return False
            if not self.running.asks_gauge and fleet.gauge_port is not None:
                return False
            if fleet.gauge_port is not None:
                try:
                    answer = httpx.get(f"http://127.0.0.1:{fleet.gauge_port}/state", trust_env=False).json()
                except httpx.HTTPError:
                    return False
                if any(entry["level"] != gauge.LEVELS[0] for entry in answer["variants"].values()):
                    return False
            return self._answers()

        wait_until(is_healthy, self.again_seconds, 0.2)


def row(fault: str, outcome: Outcome, target: str, back_seconds: float | None) -> Row:
    """The row of a load's outcome. target: the variant that had the fault; answers of others are counted as elsewhere."""
    elsewhere = sum(count for name, count in outcome.variants.items() if name != target)
    return Row(
        fault, outcome.requests, outcome.lost, outcome.broken, outcome.quiet, outcome.retried, elsewhere,
        outcome.quantile(0.5), outcome.quantile(0.99), back_seconds, dict(outcome.errors),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as text."""
    from tabulate import tabulate

    heads = {
        "fault": "fault", "requests": "requests", "lost": "lost before the first byte", "broken": "broken after it",
        "quiet": "ended quietly", "retried": "retried", "elsewhere": "answered elsewhere", "p50_seconds": "p50 s",
        "p99_seconds": "p99 s", "back_seconds": "back after s",
    }  # fmt: skip
    values = [{heads[key]: value for key, value in asdict(one).items() if key in heads} for one in rows]
    return str(tabulate(values, headers="keys", floatfmt=".3f"))


def metrics(rows: list[Row]) -> Mapping[str, float]:
    """The drill as metrics: sums over the faults, and what each of them cost as `WHAT/FAULT`."""
    found: dict[str, float] = {}
    for what in ("requests", "lost", "broken", "quiet", "retried"):
        found[f"fleet_{what}"] = float(sum(getattr(one, what) for one in rows))
    for one in rows:
        for what in ("requests", "lost", "broken", "quiet", "retried", "elsewhere", "back_seconds"):
            value = getattr(one, what)
            if value is not None:
                found[f"{what}/{re.sub('[^a-z0-9]+', '_', one.fault)}"] = float(value)
    return found
