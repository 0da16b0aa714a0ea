"""Rebuild a variant from its MLflow run.

Prints IDENTICAL, exits with 0 and makes the folder only if every file, tensor and metric equals the run's record.

Examples:
    python -m stages.rebuild run=awq-w4-g128 out=rebuilt
    python -m stages.rebuild run=awq-w4-g128 out=rebuilt from=source until=convert
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("run", "NAME", "a variant by its name, or a run by its id or fingerprint, or by a prefix of one", required=True),
    Option("out", "DIR", "a new folder: DIR/convert is the checkpoint, with the other outputs beside it", required=True),
    Option("from", "auto", "cache: DVC's cache or a remote; source: run the stages again; auto: cache, else source",
           allowed=("auto", "cache", "source")),
    Option("until", "STAGE", "the last stage to run; convert makes the checkpoint without evaluating it",
           default="evaluate"),
    Option("patch", "apply", "if the run had uncommitted changes: apply its patch, which is code from MLflow",
           allowed=("refuse", "apply")),
    Option("remote", "NAME", "the DVC remote to read; default DVC's default remote"),
]  # fmt: skip

if TYPE_CHECKING:
    from omegaconf import DictConfig


def rebuild(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import DifferentError, UserError
    from quantline.lifecycle.rebuild import MADE_AGAIN, RebuildOptions
    from quantline.lifecycle.rebuild import rebuild as bring_back
    from quantline.lifecycle.tracking.reader import read_run, tracking_of
    from quantline.pipeline.hydra_values import plain

    given, place, source, until = (str(arguments[name]) for name in ("run", "out", "from", "until"))
    if until not in MADE_AGAIN:
        raise UserError(f"until={until}: allowed are {', '.join(MADE_AGAIN[::-1])}")
    making = RebuildOptions(until, plain(cfg)["toolchains"], trust_patch=arguments["patch"] == "apply")
    run = read_run(tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT), ROOT, given)
    print(f"{run.name}, run {run.run_id}, of {run.experiment}", file=sys.stderr, flush=True)
    out = Path(place).expanduser().absolute()
    rebuilt = bring_back(run, out, ROOT, source=source, remote=arguments["remote"], making=making)
    print(f"compared: {', '.join(rebuilt.compared)}")
    if rebuilt.difference is not None:
        raise DifferentError(f"DIFFERENT, recorded | from {rebuilt.how}\n{rebuilt.difference}")
    print(f"IDENTICAL, from {rebuilt.how} -> {out}")


if __name__ == "__main__":
    main(rebuild, __file__, OPTIONS, __doc__, reads=("tracking",))
