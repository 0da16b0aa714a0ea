"""Download a promoted variant, a folder that vLLM serves: `python -m stages.fetch model=NAME alias=production out=DIR`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stages import ROOT, own_main

OWN = """Options of stages.fetch alone, the rest is the pipeline's (tracking.uri=...):
  model=NAME alias=NAME    as `python -m stages.registry` lists them
  out=DIR                  a folder to make; every file is verified before it appears
"""

if TYPE_CHECKING:
    from omegaconf import DictConfig


def fetch(cfg: DictConfig, own: dict[str, str]) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.tracking import registry
    from quantline.lifecycle.tracking.reader import tracking_of
    from quantline.pipeline.command_line import required
    from quantline.pipeline.hydra_values import plain

    model, alias, out = required(own, "model", "alias", "out")
    place = Path(out).expanduser().absolute()
    tracking = tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT)
    version = registry.fetch(tracking, ROOT, model, alias, place)
    print(f"{model} version {version.version} ({version.tags['quantline.variant']}), every file verified -> {place}")


if __name__ == "__main__":
    own_main(fetch, ("model", "alias", "out"), OWN, __file__, sys.argv)
