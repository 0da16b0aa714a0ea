"""The options of the gate on layer errors: limits on the error of each linear."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantline.config.section import Section


class ErrorLimits(Section):
    """The largest relative error of a linear, by its bits; null is no limit."""

    bits8: float | None = Field(gt=0, description="limit at 8 bits")
    bits4: float | None = Field(gt=0, description="limit at 4 bits")
    bits3: float | None = Field(gt=0, description="limit at 3 bits")
    bits2: float | None = Field(gt=0, description="limit at 2 bits")

    def of_bits(self, bits: int) -> float | None:
        """The limit for linears of these bits; None if there is none."""
        limit: float | None = getattr(self, f"bits{bits}", None)
        return limit


class ErrorLevels(Section):
    """The output errors from which a linear's error is called moderate, and high."""

    moderate: float = Field(gt=0, description="moderate from this output error")
    high: float = Field(gt=0, description="high from this output error")

    @model_validator(mode="after")
    def _ordered(self) -> ErrorLevels:
        if self.high < self.moderate:
            raise ValueError(f"high ({self.high}) is below moderate ({self.moderate}); give high the larger value")
        return self


class LayerErrorsConfig(Section):
    """The gate on layer errors, see `quantline.quantization.layer_errors`.

    Attributes:
        enabled: whether errors are measured; the files are always checked.
        samples: calibration samples for measuring errors.
        max_output_error, max_weight_error: limits by bits.
        min_tokens: calibration tokens that should reach a linear.
        few_tokens: what to do if fewer reach it.
        levels: names of output errors.
    """

    enabled: bool
    samples: int = Field(ge=1)
    max_output_error: ErrorLimits
    max_weight_error: ErrorLimits
    min_tokens: int = Field(ge=0)
    few_tokens: Literal["warn", "fail", "ignore"]
    levels: ErrorLevels
