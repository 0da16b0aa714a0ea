"""The fault drill: a load on a running fleet while something goes wrong, and how many requests that cost.

The faults of `FAKED` need servers that have them on order. Those of `REAL` can be done to any server.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

import httpx
import psutil

from quantline.config.fleet import ShareConfig
from quantline.serving.fleet import gauge
from quantline.serving.fleet.child import wait_until
from quantline.serving.fleet.load import Load, Outcome, run
from quantline.serving.fleet.running import RunningFleet

KILL, HANG, RELOAD, CANARY, DRAIN, GAUGE = "kill -9", "hang", "reload", "canary moved", "drain", "gauge killed"
REAL = (KILL, HANG, RELOAD, CANARY, DRAIN, GAUGE)
FLOODS = ("500", "429", "503")
FAKED = (KILL, HANG, *FLOODS, RELOAD, CANARY, DRAIN, GAUGE)
AGAIN_SECONDS = 120.0


@dataclass(frozen=True)
class Row:
    """What one fault cost. Seconds are of requests that were answered; see `load.Outcome` for the rest."""

    fault: str
    requests: int
    lost: int
    broken: int
    quiet: int
    retried: int
    elsewhere: int
    p50_seconds: float
    p99_seconds: float
    errors: dict[str, int]


@dataclass(frozen=True)
class Drill:
    """A drill on the first variant of a precision.

    on_order: sets a fault of a fake server by the variant's name; None where the servers are real. again_seconds: to wait
    for everything to be healthy before the next fault.
    """

    running: RunningFleet
    load: Load
    on_order: Callable[[str, str], None] | None = None
    again_seconds: float = AGAIN_SECONDS

    @property
    def target(self) -> str:
        """The variant that the faults are done to."""
        return self.running.fleet.precisions[self.load.model][0]

    def rows(self, faults: tuple[str, ...] = REAL) -> Iterator[Row]:
        """Run the faults one after the other; before each, everything is healthy again."""
        for fault in faults:
            self._await_healthy()
            outcome = run(self.load, partial(self._do, fault))
            self._undo(fault)
            yield row(fault, outcome, self.target)

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
            asked = Load(self.load.url, self.load.model, 3, 1, max_tokens=1, completions=self.load.completions)
            return run(asked).variants == {self.target: 3}

        wait_until(is_healthy, self.again_seconds, 0.2)


def row(fault: str, outcome: Outcome, target: str) -> Row:
    """The row of a load's outcome. target: the variant that had the fault; answers of others are counted as elsewhere."""
    elsewhere = sum(count for name, count in outcome.variants.items() if name != target)
    return Row(
        fault, outcome.requests, outcome.lost, outcome.broken, outcome.quiet, outcome.retried, elsewhere,
        outcome.quantile(0.5), outcome.quantile(0.99), dict(outcome.errors),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as text."""
    from tabulate import tabulate

    heads = {
        "fault": "fault", "requests": "requests", "lost": "lost before the first byte", "broken": "broken after it",
        "quiet": "ended quietly", "retried": "retried", "elsewhere": "answered elsewhere", "p50_seconds": "p50 s",
        "p99_seconds": "p99 s",
    }  # fmt: skip
    values = [{heads[key]: value for key, value in asdict(one).items() if key in heads} for one in rows]
    return str(tabulate(values, headers="keys", floatfmt=".3f"))


def metrics(rows: list[Row]) -> Mapping[str, float]:
    """The drill as metrics of a stage."""
    return {
        "fleet_lost": float(sum(one.lost for one in rows)), "fleet_requests": float(sum(one.requests for one in rows)),
        "fleet_quiet": float(sum(one.quiet for one in rows)),
    }  # fmt: skip
