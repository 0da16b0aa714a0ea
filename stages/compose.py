"""Freeze the configuration of one variant of params.yaml.

A variant that cannot be quantized is refused here, if its model is on this machine.

Examples:
    python -m stages.compose variant=awq-w4-g128
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(cfg: DictConfig) -> None:
    from quantline.core.errors import UserError
    from quantline.pipeline.compose import frozen_variant, read_params, write_frozen
    from quantline.pipeline.config import parse
    from quantline.pipeline.dvc_forms import refuse_other_form
    from quantline.pipeline.preflight import refuse_early

    if not cfg.variant:
        raise UserError("variant: is not set; give variant=NAME, a name from params.yaml; of several models MODEL/NAME")
    refuse_other_form(ROOT, read_params(ROOT / "params.yaml"))
    values = frozen_variant(ROOT, cfg.variant)
    refuse_early(parse(values), ROOT)  # here, so that an edit of the planning code composes nothing again
    print(f"compose -> {write_frozen(ROOT, cfg.variant, values).relative_to(ROOT)}")


if __name__ == "__main__":
    main(compose, __file__, about=__doc__, reads=("variant",))
