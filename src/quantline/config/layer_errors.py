"""The options of the gate on layer errors: limits on the errors of single linears."""

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

    def of_bits(self, bits: int) -> float | None:
        """The limit of a linear of so many bits; None where there is none."""
        limit: float | None = getattr(self, f"bits{bits}", None)
        return limit


class ErrorLevels(Section):
    """The output errors from which on a linear's error is called moderate, and high."""

    moderate: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> ErrorLevels:
        if self.high < self.moderate:
            raise ValueError(f"high ({self.high}) is below moderate ({self.moderate}); give it the larger one")
        return self


class LayerErrorsConfig(Section):
    """The gate on layer errors, see `quantline.quantization.layer_errors`.

    Attributes:
        enabled: whether errors are measured; the files are checked in any case.
        samples: of the calibration data.
        max_output_error, max_weight_error: limits by bits.
        min_tokens: calibration tokens that a linear should see.
        few_tokens: what to do where it saw fewer.
        levels: of the output error.
    """

    enabled: bool
    samples: int = Field(ge=1)
    max_output_error: ErrorLimits
    max_weight_error: ErrorLimits
    min_tokens: int = Field(ge=0)
    few_tokens: Literal["warn", "fail", "ignore"]
    levels: ErrorLevels
