"""The options of the tasks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantline.config.evaluate import BootstrapConfig
from quantline.config.section import Section


class LastWordConfig(Section):
    """Last-word prediction, see `quantline.evaluation.tasks.local`; `context_words` come before the word."""

    context_words: int = Field(ge=4)


class MultipleChoiceConfig(Section):
    """The choice of a passage's true continuation, see `quantline.evaluation.tasks.local`.

    Attributes:
        context_words: before the choice.
        choices: how many continuations.
        continuation_words: in each of them.
    """

    context_words: int = Field(ge=4)
    choices: int = Field(ge=2, le=10)
    continuation_words: int = Field(ge=2)


class LocalTasksConfig(Section):
    """The tasks that are built from a text; null leaves one out."""

    last_word: LastWordConfig | None
    multiple_choice: MultipleChoiceConfig | None


class StandardTaskConfig(Section):
    """A task of lm-evaluation-harness. What is null goes by the task's own definition, the limit by `tasks.limit`.

    metric: the one that recovery is judged by, as the harness names it; after a comma the filter of its answers.
    """

    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=2)
    metric: str | None = None


class GateConfig(Section):
    """The recovery that a variant must reach in every task, by every engine.

    Attributes:
        min_recovery: share of the float model's score; null is no limit.
        judged_by: the end of recovery's interval, or the estimate, that is held against the limit.
        on_failure: whether the stage fails or warns.
    """

    min_recovery: float | None = Field(gt=0)
    judged_by: Literal["low", "estimate", "high"]
    on_failure: Literal["warn", "fail"]


class TasksConfig(Section):
    """Which tasks are run, by which engines, and which recovery is enough."""

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
        """Whether there is anything to do."""
        own = self.local.last_word is not None or self.local.multiple_choice is not None
        return bool(self.engines and (own or self.standard))
