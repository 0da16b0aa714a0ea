"""The base of every section of a configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: unknown keys and loose types are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
