"""The options of the tasks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantline.config.evaluate import BootstrapConfig
from quantline.config.section import Section


class LastWordConfig(Section):
    """Last-word prediction, see `quantline.evaluation.tasks.local`; `context_words` precede the word."""

    context_words: int = Field(ge=4)


class MultipleChoiceConfig(Section):
    """Multiple choice of a passage's true continuation, see `quantline.evaluation.tasks.local`.

    Attributes:
        context_words: words before the continuation.
        choices: continuations to choose from.
        continuation_words: words in each of them.
    """

    context_words: int = Field(ge=4)
    choices: int = Field(ge=2, le=10)
    continuation_words: int = Field(ge=2)


class NeedleConfig(Section):
    """A fact far back in a context, see `quantline.evaluation.tasks.needle`.

    Attributes:
        context_words: words of the passage.
        needles: sentences in it, of which one is asked for.
    """

    context_words: int = Field(ge=8)
    needles: int = Field(default=3, ge=1, le=10)


class LocalTasksConfig(Section):
    """The tasks that are built from a text; null leaves one out. own: the text is a file of questions."""

    last_word: LastWordConfig | None
    multiple_choice: MultipleChoiceConfig | None
    needle: NeedleConfig | None = None
    own: bool = False

    @property
    def of_text(self) -> bool:
        """Whether any task is made from a text."""
        return any(one is not None for one in (self.last_word, self.multiple_choice, self.needle))


class StandardTaskConfig(Section):
    """A task of lm-evaluation-harness. null takes the task's own default."""

    num_fewshot: int | None = Field(default=None, ge=0, description="examples in the prompt")
    limit: int | None = Field(default=None, ge=2, description="items to run; null takes `tasks.limit`")
    metric: str | None = Field(
        default=None,
        description="metric of the recovery, by its name in the harness; after a comma, the filter of the answers",
    )


class GateConfig(Section):
    """The recovery that a variant must reach in every task, by every engine.

    Attributes:
        min_recovery: share of the float model's score; null is no limit.
        judged_by: which value is compared with the limit: an end of the recovery's interval, or the estimate.
        on_failure: whether the stage fails or warns.
    """

    min_recovery: float | None = Field(gt=0)
    judged_by: Literal["low", "estimate", "high"]
    on_failure: Literal["warn", "fail"]


class TasksConfig(Section):
    """Which tasks to run, with which engines, and the required recovery."""

    name: str
    engines: list[Literal["reference", "vllm"]]
    path: str
    format: str | None
    text_field: str
    seed: int = Field(ge=0, lt=2**32)
    limit: int | None = Field(ge=2)
    local: LocalTasksConfig
    standard: dict[str, StandardTaskConfig]
    download: bool
    batch_size: int = Field(ge=1)
    bootstrap: BootstrapConfig
    gate: GateConfig

    @property
    def any(self) -> bool:
        """Whether any task is to be run."""
        return bool(self.engines and (self.local.of_text or self.local.own or self.standard))


# The options that decide which items are asked, by which engines. Scores are compared item by item.
ITEM_KEYS = ("engines", "path", "format", "text_field", "seed", "limit", "local", "standard")
