"""The options of the gate on layer errors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantline.config.section import Section


class ErrorLimits(Section):
    """The largest relative error of a linear, by its bits; null is no limit."""

    bits8: float | None = Field(gt=0)
    bits4: float | None = Field(gt=0)
    bits3: float | None = Field(gt=0)
    bits2: float | None = Field(gt=0)


class ErrorLevels(Section):
    """From which output error on a linear's is called moderate, and high."""

    moderate: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> ErrorLevels:
        if self.high < self.moderate:
            raise ValueError(f"high ({self.high}) is below moderate ({self.moderate}); give it the larger one")
        return self


class LayerErrorsConfig(Section):
    """What a quantized model must come through, see `quantline.quantization.layer_errors`."""

    enabled: bool
    samples: int = Field(ge=1)
    max_output_error: ErrorLimits
    max_weight_error: ErrorLimits
    min_tokens: int = Field(ge=0)
    few_tokens: Literal["warn", "fail", "ignore"]
    levels: ErrorLevels
