"""Proves a fleet before it is used: brings it up with the real variants and runs the fault drill."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from quantline.config.fleet import FleetSmokeConfig
from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.lifecycle.fleet import HOME, Resolved, folder_of, resolve
from quantline.lifecycle.serve import Typed
from quantline.pipeline.code import stage_hash
from quantline.pipeline.config import parse
from quantline.pipeline.fleet_result import FILE, LOST, NOT_ASKED, OK, REFUSED, drill_file
from quantline.pipeline.identity import fingerprint
from quantline.pipeline.kept_servers import end_servers
from quantline.pipeline.names import joined, model_of
from quantline.pipeline.run import StageRun
from quantline.pipeline.server import server_of
from quantline.serving.fleet.drill import REAL, Drill, Row, metrics, table
from quantline.serving.fleet.load import Load
from quantline.serving.fleet.orders import is_running
from quantline.serving.fleet.running import RunningFleet
from quantline.serving.fleet.spec import read_keys
from quantline.toolchains.router import Envoy, envoy

# Of the folder of a drill's state, behind the fleet's own name, so that it disturbs no fleet that runs.
SUFFIX = "-smoke"
_LONGEST_NAME = 41
# Below the folder of all fleets: the results of drills in the pipeline, by their identity. DVC removes an output before it
# runs a stage again.
KEPT = ".drills"


def prove(root: Path, typed: Typed, *, out: Path | None = None) -> tuple[list[Row], Path]:
    """Run the drill by hand, on the first precision that has more than one variant.

    Args:
        root: the checkout.
        typed: the command line.
        out: the file that gets the result; None is one in the folder of the drill's state.

    Returns:
        What each fault cost, and the file that has it.

    Raises:
        UserError: no precision has a second variant, a drill of this fleet runs, or it cannot run here.
        ServerError: something did not start.
    """
    asked = _Asked(root, typed)
    rows, document = asked.drilled(asked.resolved())
    path = out or asked.folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return rows, path


def prove_in_pipeline(root: Path, typed: Typed) -> dict[str, Any]:
    """Run the drill as a stage of the pipeline and write its result, if the configuration asks for that.

    A result of the same checkpoints, options, servers and code stays as it is. A fleet that cannot run here is a result,
    too, and stops nothing else.

    Args:
        root: the checkout.
        typed: the frozen configuration of the float baseline.

    Returns:
        The result.

    Raises:
        ServerError: something did not start.
    """
    frozen = parse(typed.values).frozen
    model = model_of(frozen.variant) if frozen else ""
    asked, path = _Asked(root, Typed(_of_model(typed.values, model), typed.overrides)), drill_file(root, model)
    if not asked.smoke.pipeline:
        return _written(path, {"status": NOT_ASKED})
    try:
        made = asked.resolved()
    except UserError as error:
        return _written(path, {"status": REFUSED, "reason": str(error)})
    identity = asked.identity(made)
    kept = root / HOME / KEPT / f"{identity[:16]}.json"
    if former := _former(kept, identity):
        print("the fleet is what it was at a former drill, whose result stays", file=sys.stderr)
        return _written(path, former)
    end_servers()
    _, document = asked.drilled(made)
    document = {"identity": identity, **document}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, document)
    return _written(path, document)


def _of_model(values: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A configuration whose fleet names the variants of a model whole, where its options leave the model out."""
    fleet = dict(values["fleet"])
    precisions = {
        name: [one if "/" in one or "@" in one else joined(model, one) for one in chain]
        for name, chain in (fleet["precisions"] or {}).items()
    }
    return {**values, "fleet": {**fleet, "precisions": precisions}} if model else dict(values)


def drill_values(values: Mapping[str, Any], smoke: FleetSmokeConfig) -> dict[str, Any]:
    """A configuration whose fleet is that of the drill: with a name and a port of its own, on loopback, short limits."""
    fleet = dict(values["fleet"])
    limits = {**fleet["limits"], "queued_requests": smoke.queued_requests}
    limits["hang_seconds"] = min(smoke.hang_seconds, float(limits["hang_seconds"]))
    nobody = {key: {**fleet[key], "share": 0.0} for key in ("canary", "shadow", "capture")}
    return {**values, "fleet": {
        **fleet, **nobody, "name": f"{fleet['name']}"[: _LONGEST_NAME - len(SUFFIX)] + SUFFIX, "limits": limits,
        "endpoint": {**fleet["endpoint"], "host": "127.0.0.1", "port": 0},
    }}  # fmt: skip


def shown(document: Mapping[str, Any]) -> list[str]:
    """The lines by which a result is told."""
    if "rows" not in document:
        return [" ".join(filter(None, [f"fleet_smoke: {document['status']}", str(document.get("reason", ""))]))]
    lost = [f"{row['fault']}: {row['lost'] + row['quiet']}" for row in document["rows"] if row["lost"] or row["quiet"]]
    end = f"requests were lost: {', '.join(lost)}" if lost else "no request was lost"
    return [table([Row(**row) for row in document["rows"]]), f"  {document['precision']}: {end}; {FILE}"]


class _Asked:
    """The drill that a configuration asks for."""

    def __init__(self, root: Path, typed: Typed) -> None:
        self.root, self.smoke = root, parse(typed.values).fleet_smoke
        self.typed = Typed(drill_values(typed.values, self.smoke), typed.overrides)
        self.config = parse(self.typed.values)
        self.run = StageRun("serve", self.config, root, tuple(typed.overrides))
        self.folder = folder_of(root, self.config.fleet.name)
        self.program: Envoy | None = None

    def resolved(self) -> Resolved:
        chains = [name for name, chain in self.config.fleet.precisions.items() if len(chain) > 1]
        if not chains:
            raise UserError(
                "fleet.precisions: no precision has a second variant, so a fault would cost its requests; give one such as "
                "fleet.precisions.low=[awq-w4-g128,float]"
            )
        if is_running(self.folder):
            raise UserError(f"fleet.name={self.config.fleet.name}: a drill of this fleet runs already; wait for it")
        self.program = envoy(self.root, self.config.toolchains.get("router"))
        return resolve(self.root, self.typed, partial(server_of, self.run), self.run.device)

    def identity(self, made: Resolved) -> str:
        """Of all that has a part in the result but this machine's ports and load."""
        assert self.program is not None
        places: Any = {"folder": True, "log": True, "server": {"process": {"port": True}}}
        starts = [start.model_dump(mode="json", exclude=places) for start in made.starts]
        options = {"fleet": self.config.fleet.model_dump(), "smoke": self.smoke.model_dump(exclude={"pipeline"})}
        return fingerprint([
            options, starts, made.contents, self.program.build, self.run.device, stage_hash("fleet_smoke")
        ])  # fmt: skip

    def drilled(self, made: Resolved) -> tuple[list[Row], dict[str, Any]]:
        assert self.program is not None
        fleet, config, smoke = made.fleet, self.config.fleet, self.smoke
        precision = next(name for name, chain in fleet.precisions.items() if len(chain) > 1)
        began = time.time()
        with RunningFleet(fleet, self.program, made.starts, config.restart, config.capture) as running:
            load = Load(
                fleet.url, precision, smoke.requests, smoke.concurrency, completions=True, max_tokens=smoke.max_tokens,
                headers=_key(fleet.keys_file), extra={"temperature": 0}, least_seconds=smoke.least_seconds,
            )  # fmt: skip
            drill = Drill(running, load, again_seconds=smoke.again_seconds, queue_concurrency=smoke.queue_concurrency)
            rows = list(drill.rows(REAL))
        runtimes = {start.names[0]: start.server.runtime for start in made.starts}
        variants = {name: {"content": content, "runtime": runtimes[name]} for name, content in made.contents.items()}
        return rows, {
            "status": LOST if any(row.lost or row.quiet for row in rows) else OK, "precision": precision,
            "chain": list(fleet.precisions[precision]), "variants": variants, "device": self.run.device,
            "router": self.program.build, "metrics": dict(metrics(rows)), "rows": [asdict(row) for row in rows],
            "started_at": began, "seconds": time.time() - began,
        }  # fmt: skip


def _written(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(exist_ok=True)
    write_json(path, document)
    return document


def _former(path: Path, identity: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("identity") == identity else None


def _key(keys_file: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {read_keys(Path(keys_file))[0].key}"} if keys_file else {}
