"""Bring a variant back from its MLflow run alone: `python -m stages.rebuild run=ID out=DIR`.

Exit code 0 and IDENTICAL only if every file, tensor and metric is what the run recorded; DIR is made only then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("run", "ID", "a run of MLflow by its id, its fingerprint, or the beginning of one", required=True),
    Option("out", "DIR", "a folder to make: DIR/convert is the checkpoint; other outputs lie beside it", required=True),
    Option("from", "auto", "cache: DVC's or a remote; source: make it again; auto: the first that can",
           allowed=("auto", "cache", "source")),
    Option("until", "STAGE", "the last stage to make again; convert makes the checkpoint and does not evaluate it",
           default="evaluate"),
    Option("patch", "apply", "if the run was made from changed files: apply its patch, code that comes from MLflow",
           allowed=("refuse", "apply")),
    Option("remote", "NAME", "the remote of DVC to look in; else the default one"),
]  # fmt: skip

if TYPE_CHECKING:
    from omegaconf import DictConfig


def rebuild(cfg: DictConfig, own: dict[str, str | None]) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import DifferentError, UserError
    from quantline.lifecycle.rebuild import MADE_AGAIN, RebuildOptions
    from quantline.lifecycle.rebuild import rebuild as bring_back
    from quantline.lifecycle.tracking.reader import read_run, tracking_of
    from quantline.pipeline.hydra_values import plain

    given, place, source, until = (str(own[name]) for name in ("run", "out", "from", "until"))
    if until not in MADE_AGAIN:
        raise UserError(f"until={until}: allowed are {', '.join(MADE_AGAIN[::-1])}")
    making = RebuildOptions(until, plain(cfg)["toolchains"], trust_patch=own["patch"] == "apply")
    run = read_run(tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT), ROOT, given)
    print(f"{run.name}, run {run.run_id}, of {run.experiment}", file=sys.stderr, flush=True)
    out = Path(place).expanduser().absolute()
    rebuilt = bring_back(run, out, ROOT, source=source, remote=own["remote"], making=making)
    print(f"compared: {', '.join(rebuilt.compared)}")
    if rebuilt.difference is not None:
        raise DifferentError(f"DIFFERENT, recorded | from {rebuilt.how}\n{rebuilt.difference}")
    print(f"IDENTICAL, from {rebuilt.how} -> {out}")


if __name__ == "__main__":
    main(rebuild, __file__, OPTIONS, __doc__)
