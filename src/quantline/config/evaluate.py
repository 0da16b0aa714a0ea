"""The options of the evaluate stage: the text and how it is scored, further measurements, and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from quantline.config.section import Section


class BootstrapConfig(Section):
    """The confidence intervals of comparisons with the baseline.

    Attributes:
        resamples: how many times the documents are resampled.
        level: confidence level of the intervals.
        seed: of the resampling.
    """

    resamples: int = Field(ge=100)
    level: float = Field(gt=0.5, lt=1)
    seed: int = Field(ge=0)


class DivergenceConfig(Section):
    """At how many tokens the distributions are compared with the float model's; null is all, 0 none."""

    tokens: int | None = Field(ge=0)


class GenerationsConfig(Section):
    """The greedy continuations that are compared with the float model's.

    Attributes:
        prompts: how many; 0 compares none.
        prompt_tokens, new_tokens: length of a prompt and of its continuation.
        tie_margin: two most likely tokens closer than this, in nats, count as a tie.
    """

    prompts: int = Field(ge=0)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)
    tie_margin: float = Field(ge=0)


class RestoreConfig(Section):
    """How many linears are put back to float, one at a time, and how many tokens are scored again for each."""

    layers: int = Field(ge=0)
    tokens: int = Field(ge=1)


@dataclass(frozen=True)
class Alarm:
    """What a measurement beyond its limit means.

    Attributes:
        metric: the metric that is compared with the limit.
        says: the message; `value` is the measured value.
        above: values above the limit raise the alarm; if false, values below it.
    """

    metric: str
    says: str
    above: bool = True

    @property
    def percent(self) -> bool:
        """Whether the value is shown as a percentage; its limit is then shown as one too."""
        return "%}" in self.says


_CHANGED = "the weights have changed since then"


class LimitsConfig(Section):
    """The limits beyond which a measurement raises an alarm; null is no limit.

    This is the only list of them: `evaluate.fail_on` and `evaluation.thresholds` read it.
    """

    perplexity_increase: Annotated[
        float | None, Field(gt=0), Alarm("perplexity_increase", "the perplexity grew by {value:.1%}")
    ]
    kl_divergence: Annotated[
        float | None,
        Field(gt=0),
        Alarm("kl_divergence", "the next-token distributions are {value:.3g} nats a token from the float model's"),
    ]
    top1_agreement: Annotated[
        float | None,
        Field(gt=0, le=1),
        Alarm(
            "top1_agreement", "the top-1 token matches the float model's at {value:.1%} of the positions", above=False
        ),
    ]
    first_divergence: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "first_divergence_median",
            "half of the greedy continuations diverge from the float model's within {value:g} tokens",
            above=False,
        ),
    ]
    output_error_change: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "output_error_change",
            f"a linear's output error is {{value:.1%}} off the one measured after quantization: {_CHANGED}",
        ),
    ]
    weight_error_change: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "weight_error_change",
            "the error of a linear's weights is {value:.1%} off the one measured after quantization",
        ),
    ]
    changed_files: Annotated[
        int | None,
        Field(ge=0),
        Alarm("changed_files", "{value:g} files of the checkpoint differ from its conversion record"),
    ]
    output_error_outlier: Annotated[
        float | None,
        Field(gt=1),
        Alarm("output_error_outlier", "a linear's output error is {value:.3g} times that of its kind"),
    ]
    restored_share: Annotated[
        float | None,
        Field(gt=0),
        Alarm("restored_share_max", "putting one linear back to float recovers {value:.1%} of the divergence"),
    ]


ALARMS: dict[str, Alarm] = {
    name: next(part for part in field.metadata if isinstance(part, Alarm))
    for name, field in LimitsConfig.model_fields.items()
}


def _has_a_limit(name: str) -> str:
    if name not in ALARMS:
        *first, last = (f"'{known}'" for known in ALARMS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})
    return name


class ProtocolConfig(Section):
    """A complete protocol of measuring perplexity.

    Attributes:
        name: of the protocol, in results.
        level: whether the compared loss is per "token" of the model or per "word" of the text (see `data.windows`).
            Compare models with different tokenizers by word. It does not change which tokens are scored.
        path: the text, in a format of `data.documents`.
        format: one of `data.documents.FORMATS`; null takes it from the file's name.
        text_field: key or column of the text; an `id` beside it in JSON lines names the document.
        mode: "documents" cuts each into windows; "concatenated" joins them and takes full windows only.
        separator: what joins the rows in mode "concatenated".
        window: tokens in a window, at most.
        stride: tokens between the starts of consecutive windows. Equal to `window`: windows do not overlap, and the
            first token of each is not scored, since it has no context. Smaller: windows overlap. Each token is scored
            once, with at least `window - stride` tokens of context where that many exist.
        bos: "add" begins every window with the tokenizer's beginning-of-sequence token. It takes a place in the window
            and is not scored; every token of the text is. "none" adds no special token.
        max_documents: rows read, at most.
        max_document_tokens: tokens read from each document, at most.
        max_tokens: tokens of text, at most; the last document is cut to fit.
        min_tokens: documents with fewer tokens are skipped.
    """

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

    @field_validator("stride")
    @classmethod
    def _no_gaps(cls, stride: int, info: ValidationInfo) -> int:
        window = info.data.get("window")
        if window is not None and stride > window:
            raise PydanticCustomError(
                "stride", "larger than the window, so text would be skipped; give 1 to {window}", {"window": window}
            )
        return stride

    def protocol(self) -> dict[str, Any]:
        """The values of the protocol, without the other options."""
        return self.model_dump(include=set(PROTOCOL_KEYS))

    def windows(self) -> dict[str, Any]:
        """The values that decide which tokens are scored."""
        return self.model_dump(include=set(WINDOW_KEYS))


PROTOCOL_KEYS = tuple(ProtocolConfig.model_fields)
# The options that decide which tokens are scored; the server reads only these.
WINDOW_KEYS = tuple(key for key in PROTOCOL_KEYS if key not in ("name", "level"))


class EvaluateConfig(ProtocolConfig):
    """A protocol, how the engines compute it, and further measurements and limits."""

    batch_tokens: int = Field(ge=1)
    bootstrap: BootstrapConfig
    engine_tolerance: float = Field(gt=0)
    divergence: DivergenceConfig
    generations: GenerationsConfig
    restore: RestoreConfig
    limits: LimitsConfig
    fail_on: list[Annotated[str, AfterValidator(_has_a_limit), WithJsonSchema({"enum": list(ALARMS)})]]


class NoiseConfig(Section):
    """How often `stages.noise` quantizes a variant, each time with another seed."""

    runs: int = Field(ge=2, le=100)
