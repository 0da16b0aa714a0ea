"""The configuration's section `promote`: the requirements for an alias."""

from __future__ import annotations

from pydantic import Field

from quantline.config.section import Section


class PromoteConfig(Section):
    """Gates of `stages.promote`; see conf/promote/default.yaml."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,99}$")
    max_perplexity_increase: float = Field(default=0.05, gt=0)
    served: bool = True
    layer_errors: bool = True
    min_recovery: float = Field(default=0.95, ge=0, le=1)
    max_alarms: int = Field(default=1, ge=0)
    alarms: list[str] = Field(default=[])
    shadow: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
