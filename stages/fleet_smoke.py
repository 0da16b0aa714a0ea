"""Prove a fleet before it is used.

It brings the fleet up, does to its servers what can go wrong (kill -9, a hang, a full queue, documents replaced, a canary
moved, a variant drained, the gauge killed) while requests come, and says how many were lost before their first byte. Exits
with 1 if one was. In the pipeline it runs where fleet_smoke.pipeline=true asks for it, and the report has what it found.

Examples:
    python -m stages.fleet_smoke precisions.low=[awq-w4-g128,float]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("requests", "100", "during each fault; default: fleet_smoke.requests"),
    Option("out", "FILE.json", "the result; default: fleet_smoke.json in the folder of the drill's state"),
]
READS = ("fleet", "fleet_smoke", "promote", "serve", "device", "toolchains", "tracking")

if TYPE_CHECKING:
    from omegaconf import DictConfig


def fleet_smoke(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import logging
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import GateError, UserError
    from quantline.lifecycle.fleet_smoke import prove, prove_in_pipeline, shown
    from quantline.lifecycle.serve import Typed
    from quantline.pipeline.config import parse
    from quantline.pipeline.execute import check_caller
    from quantline.pipeline.hydra_values import plain
    from quantline.serving.fleet.drill import table

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    typed = Typed(plain(cfg), list(HydraConfig.get().overrides.task))
    config = parse(typed.values)
    check_caller(config, typed.overrides)
    if config.frozen:
        if any(arguments.values()):
            raise UserError("variants/float.yaml is frozen and takes no options; leave -cp and -cn out, or give none")
        for line in shown(prove_in_pipeline(ROOT, typed)):
            print(line)
        return
    if requests := arguments["requests"]:
        if not requests.isdecimal() or int(requests) < 10:
            raise UserError(f"requests={requests}: give 10 or more")
        typed = Typed(
            {**typed.values, "fleet_smoke": {**typed.values["fleet_smoke"], "requests": int(requests)}}, typed.overrides
        )
    out = Path(arguments["out"]).absolute() if arguments["out"] else None
    rows, path = prove(ROOT, typed, out=out)
    print(table(rows))
    print(f"  {path}")
    if lost := [f"{row.fault}: {row.lost + row.quiet}" for row in rows if row.lost or row.quiet]:
        raise GateError(f"requests were lost: {', '.join(lost)}; see {path}")


if __name__ == "__main__":
    from quantline.lifecycle.fleet import with_section

    sys.argv[1:] = with_section(sys.argv[1:])
    main(fleet_smoke, __file__, OPTIONS, __doc__, reads=READS)
