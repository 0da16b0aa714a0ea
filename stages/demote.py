"""Take an alias from a promoted variant: `python -m stages.demote variant=awq-w4-g128 alias=production`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME", "as it was given to stages.promote", required=True),
    Option("alias", "NAME", "as it was given to stages.promote", required=True),
    Option("model", "NAME", "the registered model; else the one that stages.promote would take"),
]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def demote(cfg: DictConfig, own: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.tracking import registry
    from quantline.lifecycle.tracking.reader import tracking_of
    from quantline.pipeline.hydra_values import plain

    name, alias = str(own["variant"]), str(own["alias"])
    tracking = tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT)
    model, version = registry.demote(tracking, ROOT, name, alias, own["model"])
    print(f"{model} version {version} ({name}) is {alias} no longer; the version stays")


if __name__ == "__main__":
    main(demote, __file__, OPTIONS, __doc__)
