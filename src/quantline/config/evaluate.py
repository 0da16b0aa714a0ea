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
        resamples: how many times the documents are drawn anew.
        level: probability that an interval is meant to cover.
        seed: of the resampling.
    """

    resamples: int = Field(ge=100)
    level: float = Field(gt=0.5, lt=1)
    seed: int = Field(ge=0)


class DivergenceConfig(Section):
    """How many tokens' distributions are compared with the float model's; null is all, 0 none."""

    tokens: int | None = Field(ge=0)


class GenerationsConfig(Section):
    """The greedy continuations that are compared with the float model's.

    Attributes:
        prompts: how many; 0 compares none.
        prompt_tokens, new_tokens: length of a prompt and of its continuation.
        tie_margin: two likeliest tokens that are this close, in nats, count as a tie.
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
        metric: the metric that is held against the limit.
        says: the message; `value` is what was measured.
        above: whether values above the limit raise the alarm, or values below it.
    """

    metric: str
    says: str
    above: bool = True

    @property
    def percent(self) -> bool:
        """Whether the value is shown as a percentage; its limit is then shown as one too."""
        return "%}" in self.says


_CHANGED = "these are not the weights that came out of quantization"


class LimitsConfig(Section):
    """The measurements that have a limit, and beyond which value each raises an alarm; null is no limit.

    The only list of them: `evaluate.fail_on` and `evaluation.thresholds` read it.
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
        Alarm("top1_agreement", "the likeliest token is the float model's at {value:.1%} of the places", above=False),
    ]
    first_divergence: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "first_divergence_median",
            "half of the greedy continuations leave the float model's within {value:g} tokens",
            above=False,
        ),
    ]
    output_error_change: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "output_error_change",
            f"a linear's output error is {{value:.1%}} off what it was when it was quantized: {_CHANGED}",
        ),
    ]
    weight_error_change: Annotated[
        float | None,
        Field(gt=0),
        Alarm(
            "weight_error_change",
            "the error of a linear's weights is {value:.1%} off what it was when it was quantized",
        ),
    ]
    changed_files: Annotated[
        int | None,
        Field(ge=0),
        Alarm("changed_files", "{value:g} files of the checkpoint are not those that its conversion recorded"),
    ]
    output_error_outlier: Annotated[
        float | None,
        Field(gt=1),
        Alarm("output_error_outlier", "a linear's output error is {value:.3g} times that of its kind"),
    ]
    restored_share: Annotated[
        float | None,
        Field(gt=0),
        Alarm("restored_share_max", "one linear, put back to float, brings back {value:.1%} of the divergence"),
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
    """A flavour of perplexity, stated in full.

    Attributes:
        name: what results are called by.
        level: whether the compared loss is per "token" of the model or per "word" of the text (see `data.windows`).
            Models of different tokenizers compare by word. It does not change which tokens are scored.
        path: the text, in a format of `data.documents`.
        format: one of `data.documents.FORMATS`; null goes by the file's name.
        text_field: key or column of the text; an `id` beside it in JSON lines names the document.
        mode: "documents" cuts each by itself; "concatenated" joins them and takes full windows only.
        separator: what joins the rows in mode "concatenated".
        window: tokens in a window, at most.
        stride: tokens from one window's beginning to the next one's. Equal to `window`: windows do not overlap, and the
            first token of each is not scored, having no context. Smaller: windows overlap, each token is scored once, and
            has at least `window - stride` tokens of context where that many exist.
        bos: "add" begins every window with the tokenizer's beginning-of-sequence token. It takes a place in the window
            and is not scored, so every token of the text is. "none" adds no special token.
        max_documents: rows read, at most.
        max_document_tokens: tokens taken of each document, at most.
        max_tokens: tokens of text, at most; the last document is cut to fit.
        min_tokens: shorter documents are left out.
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
                "stride", "text would be left out; give 1 to {window}, the window", {"window": window}
            )
        return stride

    def protocol(self) -> dict[str, Any]:
        """The plain values of the protocol alone."""
        return self.model_dump(include=set(PROTOCOL_KEYS))

    def windows(self) -> dict[str, Any]:
        """Those of them that decide which tokens are scored."""
        return self.model_dump(include=set(WINDOW_KEYS))


PROTOCOL_KEYS = tuple(ProtocolConfig.model_fields)
# What decides which tokens are scored; the server reads these and no others.
WINDOW_KEYS = tuple(key for key in PROTOCOL_KEYS if key not in ("name", "level"))


class EvaluateConfig(ProtocolConfig):
    """A protocol, how the engines compute it, and what else is measured and limited."""

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
