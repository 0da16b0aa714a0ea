"""Bring a variant back from its MLflow run alone: `python -m stages.rebuild run=ID out=DIR`.

Exit code 0 and IDENTICAL only if every file, tensor and metric is what the run recorded; DIR is made only then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stages import ROOT, own_main

OWN = """Options of stages.rebuild alone, the rest is the pipeline's (tracking.uri=...):
  run=ID                   a run of MLflow by its id, its fingerprint, or the beginning of one
  out=DIR                  a folder to make: DIR/convert is the checkpoint, beside it the other stages' outputs and results
  from=auto                cache (DVC's cache or a remote), source (make it again), or auto: the first that can
  until=evaluate           the last stage to make again; until=convert makes the checkpoint and does not judge it
  patch=apply              where the run was made from changed files: apply its patch, code that comes from MLflow
  remote=NAME              the remote of DVC to look in, else its default one
"""

if TYPE_CHECKING:
    from omegaconf import DictConfig


def rebuild(cfg: DictConfig, own: dict[str, str]) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import DifferentError
    from quantline.lifecycle.rebuild import MADE_AGAIN, Making
    from quantline.lifecycle.rebuild import rebuild as bring_back
    from quantline.lifecycle.tracking.reader import read_run, tracking_of
    from quantline.pipeline.command_line import chosen, required
    from quantline.pipeline.hydra_values import plain

    given, place = required(own, "run", "out")
    source = chosen(own, "from", ("auto", "cache", "source"))
    until, patch = chosen(own, "until", MADE_AGAIN[::-1]), chosen(own, "patch", ("refuse", "apply"))
    making = Making(until, plain(cfg)["toolchains"], trust_patch=patch == "apply")
    run = read_run(tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT), ROOT, given)
    print(f"{run.name}, run {run.run_id}, of {run.experiment}", file=sys.stderr, flush=True)
    out = Path(place).expanduser().absolute()
    rebuilt = bring_back(run, out, ROOT, source=source, remote=own.get("remote"), making=making)
    print(f"compared: {', '.join(rebuilt.compared)}")
    if rebuilt.difference is not None:
        raise DifferentError(f"DIFFERENT, recorded | from {rebuilt.how}\n{rebuilt.difference}")
    print(f"IDENTICAL, from {rebuilt.how} -> {out}")


if __name__ == "__main__":
    own_main(rebuild, ("run", "out", "from", "until", "patch", "remote"), OWN, __file__, sys.argv)
