"""How other processes find a running fleet and ask it for something: a lock that it holds, and two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantline.config.section import Section
from quantline.core.errors import ServerError, UserError
from quantline.core.files import read_json, write_json
from quantline.serving.fleet.child import wait_until
from quantline.serving.fleet.gauge import FLEET
from quantline.serving.fleet.servers import Start
from quantline.serving.fleet.spec import Fleet, fleet_command

ORDER, ANSWER, LOCK, ORDERS = "order.json", "answer.json", ".running.lock", ".orders.lock"


class Order(Section):
    """What another process asks a running fleet for. starts: of every server that it is to have."""

    number: int
    fleet: Fleet | None = None
    starts: tuple[Start, ...] = ()
    end: bool = False


def is_running(folder: Path) -> bool:
    """Whether a fleet runs from this folder."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def running_fleet(folder: Path) -> Fleet:
    """The fleet that runs from this folder.

    Raises:
        UserError: none does.
    """
    if not is_running(folder) or not (folder / FLEET).exists():
        raise UserError(f"no fleet runs from {folder}; start one: {fleet_command('up', folder)}")
    return Fleet.model_validate_json((folder / FLEET).read_text(encoding="utf-8"))


def give(folder: Path, order: Order, seconds: float = 900.0) -> None:
    """Give an order to the fleet that runs from this folder, and wait until it was followed.

    Orders of several processes follow one another; an order to end waits for no other.

    Raises:
        UserError: no fleet runs, or it refused the order.
        ServerError: it ended meanwhile, or did not answer in time.
    """
    running_fleet(folder)
    if order.end:
        _give(folder, order, seconds)
        return
    try:
        with FileLock(folder / ORDERS, timeout=seconds):
            _give(folder, order, seconds)
    except Timeout:
        raise ServerError(f"the fleet of {folder} is busy with another order for {seconds:.0f} s") from None


def _give(folder: Path, order: Order, seconds: float) -> None:
    write_json(folder / ORDER, json.loads(order.model_dump_json()))
    answered: Mapping[str, Any] = {}

    def has_answered() -> bool:
        nonlocal answered
        with suppress(OSError, ValueError):
            answered = read_json(folder / ANSWER)
        return answered.get("number") == order.number or not is_running(folder)

    if not wait_until(has_answered, seconds, 0.05):
        raise ServerError(f"the fleet of {folder} did not answer within {seconds:.0f} s")
    if answered.get("number") != order.number:
        if order.end:
            return
        raise ServerError(f"the fleet of {folder} ended; log: {folder}/envoy.log")
    if answered.get("error"):
        raise UserError(str(answered["error"]))
