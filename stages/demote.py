"""Remove an alias from a promoted variant.

Examples:
    python -m stages.demote variant=awq-w4-g128 alias=production
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME", "as given to stages.promote", required=True),
    Option("alias", "NAME", "as given to stages.promote", required=True),
    Option("model", "NAME", "the registered model; by default any model in which the variant has the alias"),
]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def demote(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.tracking import registry
    from quantline.lifecycle.tracking.reader import tracking_of
    from quantline.pipeline.hydra_values import plain

    name, alias = str(arguments["variant"]), str(arguments["alias"])
    tracking = tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT)
    model, version = registry.demote(tracking, ROOT, name, alias, arguments["model"])
    print(f"{model} version {version} ({name}) no longer has the alias {alias}; the version stays")


if __name__ == "__main__":
    main(demote, __file__, OPTIONS, __doc__, reads=("tracking",))
