"""The options of the speed stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantline.config.section import Section


class LevelConfig(Section):
    """One load level of the sweep."""

    concurrency: int = Field(ge=1, description="concurrent requests")
    prompts: int = Field(ge=1, description="requests in all")


class SpeedConfig(Section):
    """What vLLM's benchmark tools measure; without tools, nothing. See `quantline.evaluation.speed.run`.

    Attributes:
        name: of the group's file.
        tools: vLLM's.
        levels: of the sweep.
        input_tokens, output_tokens: length of a prompt and of its answer; an end-of-text token does not stop it.
        rounds: how often float and variant take turns.
        warmup_waves: batches of `concurrency` requests before each measurement, which do not count.
        seed: of the random prompts.
        enforce_eager: no CUDA graph capture; `auto` captures on a GPU only.
        side_by_side: whether both servers run at once; `auto` does so where memory allows it.
    """

    name: str
    tools: list[Literal["serve", "latency", "throughput"]]
    levels: list[LevelConfig]
    input_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=2)
    rounds: int = Field(ge=1)
    warmup_waves: int = Field(ge=0)
    seed: int = Field(ge=0)
    enforce_eager: bool | Literal["auto"]
    side_by_side: Literal["auto", "always", "never"]

    @model_validator(mode="after")
    def _levels(self) -> SpeedConfig:
        if self.tools and not self.levels:
            raise ValueError("there are no levels to measure; give speed.levels=[{concurrency: 1, prompts: 8}]")
        concurrencies = [level.concurrency for level in self.levels]
        if len(set(concurrencies)) != len(concurrencies):
            raise ValueError(f"levels {concurrencies}: a concurrency is given twice; give each once")
        return self
