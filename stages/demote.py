"""Take an alias from a promoted variant: `python -m stages.demote variant=awq-w4-g128 alias=production`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stages import ROOT, own_main

OWN = """Options of stages.demote alone, the rest is the pipeline's:
  variant=NAME alias=NAME  as they were given to stages.promote
  model=NAME               the registered model; else the one that stages.promote would take
"""

if TYPE_CHECKING:
    from omegaconf import DictConfig


def demote(cfg: DictConfig, own: dict[str, str]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.tracking import registry
    from quantline.lifecycle.tracking.reader import tracking_of
    from quantline.pipeline.command_line import required
    from quantline.pipeline.hydra_values import plain

    name, alias = required(own, "variant", "alias")
    tracking = tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT)
    model, version = registry.demote(tracking, ROOT, name, alias, own.get("model"))
    print(f"{model} version {version} ({name}) is {alias} no longer; the version stays")


if __name__ == "__main__":
    own_main(demote, ("variant", "alias", "model"), OWN, __file__, sys.argv)
