"""The running router of a fleet: its documents are checked before they are moved into place, and asked for when they are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from quantline.core.errors import ServerError, UserError
from quantline.core.files import write_json
from quantline.serving.fleet import envoy as documents_of
from quantline.serving.fleet.child import Child, wait_until
from quantline.serving.fleet.envoy import BOOT, CAPTURES, CLUSTERS, ROUTES, Documents
from quantline.serving.fleet.spec import Fleet, Key, fleet_command, read_keys
from quantline.serving.ports import require_free
from quantline.toolchains.router import Envoy

READY_SECONDS = 30.0
MOST_VALID = 8
# Its first health checks may need as long; the old clusters answer meanwhile.
APPLIED_SECONDS = 30.0


def admin(fleet: Fleet, timeout_seconds: float = 5.0) -> httpx.Client:
    """A client of the router's own port, which is on loopback."""
    return httpx.Client(base_url=f"http://127.0.0.1:{fleet.admin_port}", timeout=timeout_seconds, trust_env=False)


def figures(fleet: Fleet, pattern: str) -> dict[str, float]:
    """The router's own counters and gauges whose names match a regular expression.

    Raises:
        httpx.HTTPError: it does not answer.
    """
    with admin(fleet) as client:
        answer = client.get("/stats", params={"filter": pattern, "format": "json"}).raise_for_status().json()
    return {entry["name"]: float(entry["value"]) for entry in answer["stats"] if "value" in entry}


class Router:
    """Envoy in front of a fleet.

    threads: of Envoy; one was enough for 1000 requests a second on two cores.
    """

    def __init__(self, program: Envoy, fleet: Fleet, threads: int = 1) -> None:
        self.program, self.fleet, self.threads = program, fleet, threads
        self.folder = Path(fleet.folder)
        self.child: Child | None = None
        self._keys: tuple[Key, ...] = ()
        self._moves = 0
        self._clusters: list[dict[str, Any]] = []
        self._routes: list[dict[str, Any]] = []
        self._valid: set[str] = set()  # documents that Envoy took

    def check(self) -> None:
        """Read the clients' keys, and check all that can be checked before it starts.

        Raises:
            UserError: a port is taken, the keys cannot be read, or Envoy does not take the documents.
        """
        self._require_port()
        keys = _keys_of(self.fleet)
        self._checked(self.fleet, keys)
        self._keys = keys

    def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            UserError: a port is taken, or Envoy does not take the documents.
            ServerError: it ended, or does not listen in time.
        """
        self._require_port()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder / CAPTURES).mkdir(exist_ok=True, mode=0o700)
        made = self._checked(self.fleet, self._keys)
        self._write(BOOT, made.boot)
        self._put(CLUSTERS, made.clusters["resources"])
        self._put(ROUTES, made.routes["resources"])
        self._clusters, self._routes = made.clusters["resources"], made.routes["resources"]
        command = [
            str(self.program.program), "-c", str(self.folder / BOOT), "--concurrency", str(self.threads),
            "--disable-hot-restart", "-l", "warning", "--reject-unknown-dynamic-fields", "--drain-time-s", "30",
            "--file-flush-interval-msec", "500",
        ]  # fmt: skip
        self.child = Child("the router", command, self.folder / "envoy.log")
        if not wait_until(lambda: self._is_ready() or not self.is_alive(), READY_SECONDS) or not self.is_alive():
            self.child.require_alive("starting")
            raise ServerError(f"the router does not listen after {READY_SECONDS:.0f} s; log: {self.child.log}")
        self.child.tell_up()

    def is_alive(self) -> bool:
        """Whether Envoy runs."""
        return self.child is not None and self.child.is_alive()

    def apply(self, fleet: Fleet, *, read_again: bool = False) -> None:
        """Change the running router to another fleet without losing a request.

        New clusters come first, then the routes to them, then the clusters that no route needs any more go. read_again: the
        clients' keys; else they stay as they were read last, so that a file that is being edited stops no other change.

        Raises:
            UserError: Envoy does not take the documents, or they change what is fixed at the start; nothing is changed then.
            ServerError: Envoy did not take them over in time; it got the former ones back.
        """
        keys = _keys_of(fleet) if read_again or fleet.keys_file != self.fleet.keys_file else self._keys
        made = self._checked(fleet, keys)
        if made.boot != documents_of.documents(self.fleet, self._keys).boot:
            raise UserError(
                "fleet.endpoint, fleet.capture and whether there is a keys_file cannot be changed while the fleet is up; "
                f"run `{fleet_command('down', Path(self.fleet.folder))}`, then `up`"
            )
        clusters, routes = made.clusters["resources"], made.routes["resources"]
        new, former = {one["name"] for one in clusters}, {one["name"] for one in self._clusters}
        kept = [one for one in self._clusters if one["name"] not in new]
        try:
            self._put(CLUSTERS, [*kept, *clusters], wait=True)
            self._put(ROUTES, routes, wait=True)
            if kept:
                self._put(CLUSTERS, clusters, wait=True)
        except ServerError:
            self._put(CLUSTERS, [*self._clusters, *(one for one in clusters if one["name"] not in former)])
            self._put(ROUTES, self._routes)
            raise
        self.fleet, self._keys, self._clusters, self._routes = fleet, keys, clusters, routes

    def prepare(self, fleet: Fleet) -> None:
        """Check the documents of a fleet that may have to be applied in a hurry.

        Raises:
            UserError: Envoy does not take them.
        """
        self._checked(fleet, self._keys)

    def drain(self, seconds: float) -> bool:
        """Take no new connection, and wait until every request is answered, `seconds` at most; whether that was so."""
        with admin(self.fleet) as client:
            client.post("/drain_listeners?graceful&skip_exit").raise_for_status()
        name = f"http.{documents_of.STAT_PREFIX}.downstream_rq_active"
        return wait_until(lambda: not figures(self.fleet, f"^{name}$").get(name, 0), seconds, 0.1)

    def end(self) -> None:
        """End it."""
        if self.child is not None:
            self.child.end()

    def _require_port(self) -> None:
        end = self.fleet.endpoint
        require_free(end.host, end.port, "give fleet.endpoint.port=NUMBER, 0 for a free one")

    def _checked(self, fleet: Fleet, keys: Sequence[Key]) -> Documents:
        made = documents_of.documents(fleet, keys)
        text = json.dumps(made.whole, sort_keys=True)
        if text not in self._valid:
            self.program.validate(made.whole, self.folder / "checked.json")
            self._valid = {*self._valid, text} if len(self._valid) < MOST_VALID else {text}
        return made

    def _put(self, name: str, resources: Sequence[dict[str, Any]], *, wait: bool = False) -> None:
        self._moves += 1
        version = str(self._moves)
        self._write(name, {"version_info": version, "resources": list(resources)})
        if wait and not wait_until(lambda: self._has(name, version), APPLIED_SECONDS, 0.05):
            raise ServerError(
                f"the router did not take {name} in {APPLIED_SECONDS:.0f} s; log: {self.folder}/envoy.log"
            )

    def _has(self, name: str, version: str) -> bool:
        stat = "cluster_manager.cds" if name == CLUSTERS else f"http.{documents_of.STAT_PREFIX}.rds.fleet"
        try:
            with admin(self.fleet) as client:
                text = client.get("/stats", params={"filter": f"^{stat}.version_text$"}).text
                if name == CLUSTERS and figures(self.fleet, "^cluster_manager.warming_clusters$") != {
                    "cluster_manager.warming_clusters": 0.0
                }:
                    return False
        except httpx.HTTPError:
            return False
        return text.strip().endswith(f'"{version}"')

    def _is_ready(self) -> bool:
        try:
            with admin(self.fleet, 1.0) as client:
                return client.get("/ready").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Write a file that this user alone can read, since keys may be in it, and move it into place."""
        fresh = self.folder / f".{name}.new"
        write_json(fresh, value)
        fresh.chmod(0o600)
        os.replace(fresh, self.folder / name)


def _keys_of(fleet: Fleet) -> tuple[Key, ...]:
    return read_keys(Path(fleet.keys_file).expanduser()) if fleet.keys_file else ()
