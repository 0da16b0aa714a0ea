"""Proves a fleet before it is used: brings it up with the real variants and runs the fault drill."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.lifecycle.fleet import folder_of, resolve
from quantline.lifecycle.serve import Typed
from quantline.pipeline.config import parse
from quantline.pipeline.run import StageRun
from quantline.pipeline.server import server_of
from quantline.serving.fleet.drill import REAL, Drill, Row, metrics
from quantline.serving.fleet.load import Load
from quantline.serving.fleet.orders import is_running
from quantline.serving.fleet.running import RunningFleet
from quantline.toolchains.router import envoy

RESULT = "fleet_smoke.json"
# A stopped server is given up after this, whatever the fleet's own limit is: the drill need not wait for minutes.
HANG_SECONDS = 10.0
# A vLLM server was seen to need 200 s to start beside others on two cores.
AGAIN_SECONDS = 600.0


def prove(
    root: Path, typed: Typed, requests: int, *, concurrency: int = 4, out: Path | None = None
) -> tuple[list[Row], Path]:
    """Run the drill on the first precision that has more than one variant.

    Args:
        root: the checkout.
        typed: the command line.
        requests: during each fault.
        concurrency: at a time.
        out: the file that gets the result; None is one in the fleet's folder.

    Returns:
        What each fault cost, and the file that has it.

    Raises:
        UserError: no precision has a second variant, a fleet of this name runs, or it cannot run here.
        ServerError: something did not start.
    """
    config = parse(typed.values)
    run = StageRun("serve", config, root, tuple(typed.overrides))
    made = resolve(root, typed, server_of(run), run.device)
    chains = [name for name, chain in made.fleet.precisions.items() if len(chain) > 1]
    if not chains:
        raise UserError(
            "fleet.precisions: no precision has a second variant, so a fault would cost its requests; give one such as "
            "precisions.low=[awq-w4-g128,float]"
        )
    folder = folder_of(root, config.fleet.name)
    if is_running(folder):
        raise UserError(f"fleet.name={config.fleet.name}: is running; give another name")
    fleet = made.fleet.model_copy(update={"hang_seconds": min(HANG_SECONDS, made.fleet.hang_seconds)})
    program = envoy(root, config.toolchains.get("router"))
    with RunningFleet(fleet, program, made.starts, config.fleet.restart, config.fleet.capture) as running:
        load = Load(
            fleet.url, chains[0], requests, concurrency, completions=True, max_tokens=16,
            headers=_key(fleet.keys_file), extra={"temperature": 0},
        )  # fmt: skip
        rows = list(Drill(running, load, again_seconds=AGAIN_SECONDS).rows(REAL))
    path = out or folder / RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "metrics": dict(metrics(rows)), "precision": chains[0], "chain": list(fleet.precisions[chains[0]]),
        "router": program.build, "rows": [asdict(row) for row in rows],
    })  # fmt: skip
    return rows, path


def _key(keys_file: str | None) -> dict[str, str]:
    from quantline.serving.fleet.spec import read_keys

    return {"authorization": f"Bearer {read_keys(Path(keys_file))[0].key}"} if keys_file else {}
