"""The options of the evaluate stage: the text and how it is scored, further measurements, and their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from quantline.config.limits import ALARMS, LimitsConfig, has_a_limit
from quantline.config.section import Section

# The window of the protocol `perplexity`, in tokens, where the model takes as many.
USUAL_WINDOW = 512


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
        window: tokens in a window, at most; "auto" is `USUAL_WINDOW`, and no more than the model takes, see `fitted`.
        stride: tokens between the starts of consecutive windows; "auto" is `window`. Equal to `window`: windows do not
            overlap, and the first token of each is not scored, since it has no context. Smaller: windows overlap. Each
            token is scored once, with at least `window - stride` tokens of context where that many exist.
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
    window: Annotated[int, Field(ge=2)] | Literal["auto"]
    stride: Annotated[int, Field(ge=1)] | Literal["auto"]
    bos: Literal["none", "add"]
    max_documents: int | None = Field(ge=2)
    max_document_tokens: int | None = Field(ge=2)
    max_tokens: int | None = Field(ge=2)
    min_tokens: int = Field(ge=1)

    @field_validator("stride")
    @classmethod
    def _no_gaps(cls, stride: int | str, info: ValidationInfo) -> int | str:
        window = info.data.get("window")
        window = USUAL_WINDOW if window == "auto" else window
        if isinstance(stride, int) and window is not None and stride > window:
            raise PydanticCustomError(
                "stride", "larger than the window, so text would be skipped; give 1 to {window}", {"window": window}
            )
        return stride

    def fitted(self, positions: int | None = None) -> Self:
        """The same with numbers in the place of `auto`. The server must take one token more than a window.

        positions: the most tokens that the model takes; None if that is unknown.
        """
        if self.window == "auto":
            window = max(2, min(USUAL_WINDOW, positions - 1)) if positions else USUAL_WINDOW
            stride = window if self.stride == "auto" else min(self.stride, window)
        else:
            window = self.window
            stride = window if self.stride == "auto" else self.stride
        return self.model_copy(update={"window": window, "stride": stride})

    @property
    def lengths(self) -> tuple[int, int]:
        """Window and stride of a protocol that is `fitted`."""
        assert self.window != "auto"
        assert self.stride != "auto"
        return self.window, self.stride

    def protocol(self) -> dict[str, Any]:
        """The values of the protocol, without the other options."""
        return self.fitted().model_dump(include=set(PROTOCOL_KEYS))

    def windows(self) -> dict[str, Any]:
        """The values that decide which tokens are scored."""
        return self.fitted().model_dump(include=set(WINDOW_KEYS))


PROTOCOL_KEYS = tuple(ProtocolConfig.model_fields)
# The options that decide which tokens are scored; the server reads only these.
WINDOW_KEYS = tuple(key for key in PROTOCOL_KEYS if key not in ("name", "level"))


class EvaluateConfig(ProtocolConfig):
    """A protocol, how the engines compute it (on how many GPUs), and further measurements and limits."""

    batch_tokens: int = Field(ge=1)
    gpus: int = Field(default=1, ge=1, le=64)
    bootstrap: BootstrapConfig
    engine_tolerance: float = Field(gt=0)
    divergence: DivergenceConfig
    generations: GenerationsConfig
    restore: RestoreConfig
    limits: LimitsConfig
    fail_on: list[Annotated[str, AfterValidator(has_a_limit), WithJsonSchema({"enum": list(ALARMS)})]]


class SensitivityConfig(Section):
    """What `stages.sensitivity` measures: the loss of each unit of linears at these widths."""

    bits: list[Literal[2, 3, 4, 8]] = Field(default=[2, 3, 4, 8], min_length=1)
    samples: int = Field(default=4, ge=1)


class NoiseConfig(Section):
    """How often `stages.noise` quantizes a variant, each time with another seed."""

    runs: int = Field(ge=2, le=100)
