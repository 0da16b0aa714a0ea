"""List the promoted variants: `python -m stages.registry`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def registry(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.entry import plain
    from quantline.registry import versions
    from quantline.registry_table import render
    from quantline.tracked_runs import tracking_of

    print(render(versions(tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT), ROOT)))


if __name__ == "__main__":
    main(registry, __file__)
