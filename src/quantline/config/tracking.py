"""Options of the tracking server."""

from __future__ import annotations

from pydantic import Field

from quantline.config.section import Section


class TrackingConfig(Section):
    """Where measurements are published."""

    enabled: bool
    uri: str | None
    experiment: str | None
    background: bool = False
    timeout_seconds: float = Field(gt=0)
