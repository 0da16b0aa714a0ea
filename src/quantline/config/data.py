"""Options of the float model and of the calibration text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantline.config.section import Section


class ModelConfig(Section):
    """Where the float model comes from: a pinned commit of a hub's repository, or a folder."""

    name: str | None
    repo: str | None
    revision: str | None
    path: str | None
    allow_pickle: bool
    trust_remote_code: bool


class SourceConfig(Section):
    """One source of calibration text and its share of the samples."""

    weight: float = Field(gt=0.0)
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    format: str | None = None
    text_field: str = "text"


class CalibrationConfig(Section):
    """Which text the methods calibrate on, and how it becomes samples of equal length."""

    name: str
    path: str | None
    n_samples: int = Field(ge=1)
    seq_len: int = Field(ge=8)
    seed: int = Field(ge=0)
    chat_template: bool
    packing: Literal["concat", "document"]
    skip_empty: bool
    sources: dict[str, SourceConfig] = Field(min_length=1)


EMBEDDED_MODEL = "assets/demo/model"
