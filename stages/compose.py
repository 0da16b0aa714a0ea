"""Freeze the configuration of one variant of params.yaml: `python -m stages.compose variant=NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(cfg: DictConfig) -> None:
    from quantline.core.errors import UserError
    from quantline.pipeline.compose import freeze

    if not cfg.variant:
        raise UserError("variant: is not set; give variant=NAME, a name from params.yaml")
    print(f"compose -> {freeze(ROOT, cfg.variant).relative_to(ROOT)}")


if __name__ == "__main__":
    main(compose, __file__, about=__doc__, reads=("variant",))
