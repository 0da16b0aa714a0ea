"""Several variants behind one OpenAI-compatible endpoint.

It starts a server for each variant and a router before them, says where each name goes, and runs until Ctrl-C or `down`. The
other actions are for a running fleet: `status`, `reload` with other options, `canary`, `drain` and `down`. `export` writes
what keeps a fleet running elsewhere.

Examples:
    python -m stages.fleet up precisions.low=[awq-w4-g128,float]
    python -m stages.fleet status watch=true
    python -m stages.fleet canary variant=gptq-w4-g128 precision=low share=0.05
    python -m stages.fleet down
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

ACTIONS = ("status", "up", "reload", "canary", "drain", "down", "export")
OPTIONS = [
    Option("action", "ACTION", "what to do; `action=` may be left out", allowed=ACTIONS, bare=True),
    Option("variant", "NAME", "canary: that gets the share; drain: that gets no more requests while others can answer"),
    Option("precision", "NAME", "canary: whose requests are shared"),
    Option("share", "0.05", "canary: of the requests, 0 to 1; 0 ends it"),
    Option("undo", "true", "drain: give the variant its requests back", allowed=("false", "true")),
    Option("form", "systemd", "export: what is written", allowed=("systemd", "compose", "kubernetes")),
    Option("to", "DIR", "export: where to; default: export/ in the fleet's folder"),
    Option("watch", "true", "status: show it again every two seconds until Ctrl-C", allowed=("false", "true")),
]
READS = ("fleet", "promote", "serve", "device", "toolchains", "tracking")

if TYPE_CHECKING:
    from omegaconf import DictConfig


def fleet(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import logging

    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle import fleet_commands as commands
    from quantline.lifecycle.serve import Typed
    from quantline.pipeline.hydra_values import plain

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each request
    typed = Typed(plain(cfg), list(HydraConfig.get().overrides.task))
    action = arguments["action"] or "status"
    commands.refuse_unused(action, arguments, typed)
    match action:
        case "up":
            commands.up(ROOT, typed)
        case "reload":
            commands.reload(ROOT, typed)
        case "canary":
            commands.canary(ROOT, typed, arguments)
        case "drain":
            commands.drain(ROOT, typed, arguments)
        case "export":
            commands.export(ROOT, typed, arguments)
        case "down":
            commands.down(ROOT, typed)
        case _:
            commands.status(ROOT, typed, watch=arguments["watch"] == "true")


if __name__ == "__main__":
    from quantline.lifecycle.fleet import with_section

    sys.argv[1:] = with_section(sys.argv[1:])
    main(fleet, __file__, OPTIONS, __doc__, reads=READS)
