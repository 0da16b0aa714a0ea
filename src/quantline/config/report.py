"""The options of the report: which variant it recommends, and why."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantline.config.section import Section

# Columns of the variants' table that rules and preferences can use; see `report.tables`.
Judged = Literal[
    "perplexity", "difference_percent", "difference_low_percent", "difference_high_percent", "kl_divergence",
    "kl_divergence_high", "top1_agreement", "top1_agreement_low", "identical_generations", "recovery_lowest",
    "recovery_lowest_low", "tasks_passed", "alarms", "served", "size_bytes", "compression_ratio",
    "weights_memory_bytes", "output_tokens_per_second", "speed_up", "slower_than_float", "load_seconds",
    "quantize_seconds", "quantize_peak_bytes", "output_error_max",
]  # fmt: skip


class Rule(Section):
    """A limit on a column of the variants' table."""

    column: Judged = Field(description="column of report/data/variants.csv")
    at_most: float | None = Field(default=None, description="largest value that passes")
    at_least: float | None = Field(default=None, description="smallest value that passes")
    equals: bool | None = Field(default=None, description="the only value that passes")
    missing: Literal["fail", "pass"] = Field(description="fail or pass a variant for which the column was not measured")

    @model_validator(mode="after")
    def _one_limit(self) -> Rule:
        if sum(limit is not None for limit in (self.at_most, self.at_least, self.equals)) != 1:
            raise ValueError("give exactly one of at_most, at_least and equals")
        return self


class Preference(Section):
    """A criterion to choose among the variants that meet every rule."""

    column: Judged = Field(description="column of report/data/variants.csv")
    best: Literal["lowest", "highest"] = Field(description="which value is best")
    within_percent: float = Field(ge=0, description="variants this close to the best go on to the next criterion")


class ReportConfig(Section):
    """See `report.recommendation`."""

    rules: dict[str, Rule]
    prefer: list[Preference]
    worst_layers: int = Field(ge=1)
