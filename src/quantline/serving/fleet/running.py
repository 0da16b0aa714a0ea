"""A running fleet: servers, gauge and router, kept alive, changed by orders of other processes, and ended together.

Every process below it has a supervisor that ends it when this process ends, even when it is killed. The folder of the
fleet's state has `fleet.json` (what runs), `status.json` (how the servers do), `order.json` (what another process asks for)
and `answer.json` (what became of that).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from filelock import FileLock, Timeout

from quantline.config.fleet import CaptureConfig, RestartConfig
from quantline.core.errors import QuantlineError, ServerError, UserError
from quantline.core.files import write_json
from quantline.serving.fleet import gauge as gauge_process
from quantline.serving.fleet.captures import remove_old
from quantline.serving.fleet.child import Child, wait_until
from quantline.serving.fleet.orders import ANSWER, LOCK, ORDER, Order
from quantline.serving.fleet.router import Router
from quantline.serving.fleet.servers import Keeper, Start
from quantline.serving.fleet.spec import Fleet, fleet_command
from quantline.toolchains.router import Envoy

FLEET, STATUS = gauge_process.FLEET, gauge_process.STATUS
GAUGE_READY_SECONDS = 20.0
# Of the gauge: looks without an answer until it counts as ended. The router's own checks give up after two.
GAUGE_MISSES = 2
STEP_SECONDS = 0.2
CAPTURES_EVERY_SECONDS = 30.0
# Until a server that ends its work by itself is ended.
DRAIN_SECONDS = 30.0


class RunningFleet:
    """All processes of one fleet.

    with RunningFleet(fleet, envoy, starts) as running:
        running.stay()
    """

    def __init__(
        self, fleet: Fleet, program: Envoy, starts: Sequence[Start], restart: RestartConfig | None = None,
        capture: CaptureConfig | None = None,
    ) -> None:  # fmt: skip
        self.fleet, self.program = fleet, program
        self.restart, self.capture = restart or RestartConfig(), capture or CaptureConfig()
        self.folder = Path(fleet.folder)
        self.keepers: dict[str, Keeper] = {start.names[0]: Keeper(start, self.restart) for start in starts}
        self.router = Router(program, fleet)
        self.gauge: Child | None = None
        self.asks_gauge = False  # whether the router asks the gauge now
        self.should_end = False
        self._lock = FileLock(self.folder / LOCK)
        self._misses = self._keys_changed = 0
        self._gauge_at = self._captures_at = self._looked_at = 0.0
        self._gauge_pause = self.restart.first_seconds
        self._leaving: list[Keeper] = []
        self._status: dict[str, Any] = {}
        self._client = httpx.Client(timeout=1.0, trust_env=False)

    def __enter__(self) -> RunningFleet:
        """Start everything and wait until every server and the router are ready.

        Raises:
            UserError: a fleet of this name is running, a port is taken, or the clients' keys cannot be read.
            ServerError: a server, the gauge or the router did not start.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.folder}: a fleet of this name is running; run `{fleet_command('down', self.folder)}`, or give "
                "fleet.name=NAME"
            ) from None
        try:
            for name in (ORDER, ANSWER):
                (self.folder / name).unlink(missing_ok=True)
            self._note()
            self._keys_changed = _changed(self.fleet.keys_file)
            self.router.check()  # before servers load for minutes
            self._begin(self.keepers.values())
            self._start_gauge()
            self.router.fleet = self._seen_fleet()
            self.router.start()
            self._prepare()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def stay(self) -> None:
        """Keep everything alive and follow orders until one says to end.

        Raises:
            ServerError: the router cannot be started again.
        """
        while not self.should_end:
            self.step()
            time.sleep(STEP_SECONDS)

    def step(self) -> None:
        """Look after everything once."""
        if not self.router.is_alive():
            print("the router ended and is started again", file=sys.stderr)
            self.router.fleet = self._seen_fleet()
            self.router.start()
        self._tend_gauge()
        self._read_keys()
        self._follow()
        now = time.monotonic()
        if now - self._captures_at > CAPTURES_EVERY_SECONDS:
            self._captures_at = now
            remove_old(self.folder, self.capture)
        for keeper in [keeper for keeper in self._leaving if self._is_idle(keeper)]:
            self._leaving.remove(keeper)
            keeper.stop()
        self._note()

    def change(self, fleet: Fleet, starts: Sequence[Start] = ()) -> None:
        """Become another fleet: start what is new, wait for it, tell the router, and let go what is no longer in it.

        Raises:
            QuantlineError: a new server does not start, or the router does not take the change; then all is as before.
        """
        fresh = {start.names[0]: Keeper(start, self.restart) for start in starts if start.names[0] not in self.keepers}
        before = self.fleet
        try:
            self._begin(fresh.values())
            self.fleet = fleet
            self._note()
            self.router.apply(self._seen_fleet())
            self._prepare()
        except BaseException:
            self.fleet = before
            self._note()
            for keeper in fresh.values():
                keeper.end()
            raise
        self.keepers.update(fresh)
        wanted = {variant.name for variant in fleet.variants}
        for name in [name for name in self.keepers if name not in wanted]:
            self._leaving.append(self.keepers.pop(name))
        self._note()

    def end(self) -> None:
        """Answer what has begun, then end every process."""
        if self.router.is_alive():
            with suppress(httpx.HTTPError):
                self.router.drain(DRAIN_SECONDS)
        self.router.end()
        if self.gauge is not None:
            self.gauge.end()
        keepers = [*self.keepers.values(), *self._leaving]
        for keeper in keepers:
            keeper.stop()
        for keeper in keepers:
            if keeper.ready.is_set():
                keeper.end()
        if any(keeper.is_starting() for keeper in keepers):
            _end_supervisors()  # of servers that are loading, which cannot be told to end
        for keeper in keepers:
            keeper.end()
        self._client.close()
        (self.folder / STATUS).unlink(missing_ok=True)
        self._lock.release()

    def _begin(self, keepers: Iterable[Keeper]) -> None:
        """Start servers and wait until they are ready: on a GPU one by one, since each measures the memory that is free."""
        waiting = []
        for keeper in keepers:
            keeper.begin()
            waiting.append(keeper)
            if keeper.start.server.device == "cuda":
                self._await([keeper])
        self._await(waiting)

    def _await(self, keepers: Sequence[Keeper]) -> None:
        for keeper in keepers:
            wait_until(lambda keeper=keeper: keeper.ready.is_set() or keeper.has_failed(), 3600.0, 0.05)
            if keeper.has_failed():
                raise ServerError(f"{keeper.name}: {keeper.fault}")

    def _is_idle(self, keeper: Keeper) -> bool:
        """Whether a server that gets no more requests has answered its last."""
        server = keeper.server
        if server is None:
            return True
        try:
            text = self._client.get(f"{server.url}/metrics").text
        except httpx.HTTPError:
            return True
        seen = gauge_process.seen_in(text, server.options.runtime)
        return not seen.running + seen.waiting

    def _seen_fleet(self) -> Fleet:
        """The fleet as the router is to see it: without a gauge, its health checks go to the servers themselves."""
        return self.fleet if self.asks_gauge else self.fleet.model_copy(update={"gauge_port": None})

    def _prepare(self) -> None:
        """Have the documents checked that are needed at once when the gauge ends."""
        if self.asks_gauge:
            self.router.prepare(self.fleet.model_copy(update={"gauge_port": None}))

    def _start_gauge(self) -> None:
        port = self.fleet.gauge_port
        if port is None:
            return
        command = [sys.executable, "-m", gauge_process.__name__, str(self.folder)]
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH")]))
        self.gauge = Child("the gauge", command, self.folder / "gauge.log", {"PYTHONPATH": path})
        self._gauge_at = time.monotonic()
        self.asks_gauge = (
            wait_until(
                lambda: self._gauge_answers() or self.gauge is None or not self.gauge.is_alive(),
                GAUGE_READY_SECONDS,
                0.05,
            )
            and self._gauge_answers()
        )
        if self.asks_gauge:
            self.gauge.tell_up()

    def _gauge_answers(self) -> bool:
        try:
            return self._client.get(f"http://127.0.0.1:{self.fleet.gauge_port}/alive").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _tend_gauge(self) -> None:
        if self.fleet.gauge_port is None:
            return
        now = time.monotonic()
        if self.asks_gauge and self.gauge is not None:
            if self.gauge.is_alive() and now - self._looked_at < 0.5:
                return
            self._looked_at = now
            self._misses = 0 if self._gauge_answers() else self._misses + 1
            if self.gauge.is_alive() and self._misses < GAUGE_MISSES:
                if now - self._gauge_at > 60.0:
                    self._gauge_pause = self.restart.first_seconds
                return
            self.asks_gauge, self._misses = False, 0
            print("the gauge ended; the router asks the servers themselves", file=sys.stderr)
            self.router.apply(self._seen_fleet())
            self.gauge.end(kill=True)
            self._gauge_at = now
        elif now - self._gauge_at > self._gauge_pause:
            self._gauge_pause = min(self._gauge_pause * 2, self.restart.most_seconds)
            self._start_gauge()
            if self.asks_gauge:
                self.router.apply(self._seen_fleet())

    def _read_keys(self) -> None:
        """Let the router know the clients' keys again where their file changed."""
        changed = _changed(self.fleet.keys_file)
        if not changed or changed == self._keys_changed:
            return
        self._keys_changed = changed
        try:
            self.router.apply(self._seen_fleet(), read_again=True)
        except QuantlineError as error:
            print(f"the keys stay as they were: {error}", file=sys.stderr)

    def _follow(self) -> None:
        """Follow an order, if there is a new one."""
        path = self.folder / ORDER
        if not path.exists():
            return
        answer: dict[str, Any] = {}
        try:
            order = Order.model_validate_json(path.read_text(encoding="utf-8"))
            answer["number"] = order.number
            path.unlink()
            if order.end:
                self.should_end = True
            elif order.fleet is not None:
                if order.fleet.generation != self.fleet.generation + 1:
                    raise UserError(
                        "another command changed the fleet meanwhile; look at its status, and run this again"
                    )
                self.change(order.fleet, order.starts)
        except QuantlineError as error:
            answer["error"] = str(error)
        except ValueError as error:
            path.unlink(missing_ok=True)
            answer["error"] = f"the order cannot be read: {error}"
        write_json(self.folder / ANSWER, answer)

    def _note(self) -> None:
        """Write what runs, where it changed."""
        fleet_file = self.folder / FLEET
        text = self.fleet.model_dump_json(indent=2)
        if not fleet_file.exists() or fleet_file.read_text(encoding="utf-8") != text:
            fresh = fleet_file.with_name(f".{FLEET}.new")
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, fleet_file)
        status: dict[str, Any] = {
            name: {"starts": keeper.starts, "fault": keeper.fault, "up": keeper.server is not None}
            for name, keeper in self.keepers.items()
        }
        status["pid"] = os.getpid()
        if status != self._status:
            write_json(self.folder / STATUS, status)
            self._status = status


def _changed(path: str | None) -> int:
    """When a file was changed; 0 if there is none."""
    try:
        return Path(path).stat().st_mtime_ns if path else 0
    except OSError:
        return 0


def _end_supervisors() -> None:
    """End the supervisors below this process, and with them what they supervise."""
    left = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(part.endswith("process_tree.py") for part in child.cmdline()):
                child.terminate()
                left.append(child)
    psutil.wait_procs(left, timeout=15)
