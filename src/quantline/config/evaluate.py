"""The options of the evaluate stage: a flavour of perplexity, the instruments beside it, and their limits."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quantline.config.section import Section

# What decides which tokens are scored; the server reads these and no others.
WINDOW_KEYS = (
    "path", "format", "text_field", "mode", "separator", "window", "stride", "bos", "max_documents",
    "max_document_tokens", "max_tokens", "min_tokens",
)  # fmt: skip
PROTOCOL_KEYS = ("name", "level", *WINDOW_KEYS)
Instrument = Literal[
    "perplexity_increase",
    "kl_divergence",
    "top1_agreement",
    "first_divergence",
    "output_error_change",
    "weight_error_change",
    "changed_files",
    "output_error_outlier",
    "restored_share",
]


class BootstrapConfig(Section):
    """The interval of what is compared with the baseline."""

    resamples: int = Field(ge=100)
    level: float = Field(gt=0.5, lt=1)
    seed: int = Field(ge=0)


class DivergenceConfig(Section):
    """Of how many tokens' distributions the divergence from the float model is measured; null is all, 0 none."""

    tokens: int | None = Field(ge=0)


class GenerationsConfig(Section):
    """The greedy continuations that are compared with the float model's; no prompts, no comparison."""

    prompts: int = Field(ge=0)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)
    tie_margin: float = Field(ge=0)


class RestoreConfig(Section):
    """How many linears are put back to float, one at a time, and how many tokens are scored again for each."""

    layers: int = Field(ge=0)
    tokens: int = Field(ge=1)


class LimitsConfig(Section):
    """Beyond which a measurement raises an alarm, by instrument; null is no limit."""

    perplexity_increase: float | None = Field(gt=0)
    kl_divergence: float | None = Field(gt=0)
    top1_agreement: float | None = Field(gt=0, le=1)
    first_divergence: float | None = Field(gt=0)
    output_error_change: float | None = Field(gt=0)
    weight_error_change: float | None = Field(gt=0)
    changed_files: int | None = Field(ge=0)
    output_error_outlier: float | None = Field(gt=1)
    restored_share: float | None = Field(gt=0)


class EvaluateConfig(Section):
    """A flavour of perplexity, stated in full (see `windows.Protocol`), and how it is compared."""

    name: str
    level: Literal["token", "word"]
    path: str | None
    format: str | None
    text_field: str
    mode: Literal["documents", "concatenated"]
    separator: str
    window: int = Field(ge=2)
    stride: int = Field(ge=1)
    bos: Literal["none", "add"]
    max_documents: int | None = Field(ge=2)
    max_document_tokens: int | None = Field(ge=2)
    max_tokens: int | None = Field(ge=2)
    min_tokens: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)
    bootstrap: BootstrapConfig
    engine_tolerance: float = Field(gt=0)
    divergence: DivergenceConfig
    generations: GenerationsConfig
    restore: RestoreConfig
    limits: LimitsConfig
    fail_on: list[Instrument]

    def protocol(self) -> dict[str, Any]:
        """The values of `windows.Protocol`."""
        return self.model_dump(include=set(PROTOCOL_KEYS))

    def windows(self) -> dict[str, Any]:
        """Those of them that decide which tokens are scored."""
        return self.model_dump(include=set(WINDOW_KEYS))


class NoiseConfig(Section):
    """How often `stages.noise` quantizes a variant, each time with another seed."""

    runs: int = Field(ge=2, le=100)
