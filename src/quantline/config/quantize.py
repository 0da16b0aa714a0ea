"""How the quantize stage runs."""

from __future__ import annotations

from pydantic import Field

from quantline.config.section import Section


class QuantizeConfig(Section):
    """How many GPUs (or, with device=cpu, processes) quantize a variant; another number gives other weights."""

    gpus: int = Field(default=1, ge=1, le=64)
