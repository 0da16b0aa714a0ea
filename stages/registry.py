"""List the promoted variants.

Examples:
    python -m stages.registry
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def registry(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.tracking.reader import tracking_of
    from quantline.lifecycle.tracking.registry import render, versions
    from quantline.pipeline.hydra_values import plain

    print(render(versions(tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT), ROOT)))


if __name__ == "__main__":
    main(registry, __file__, about=__doc__, reads=("tracking",))
