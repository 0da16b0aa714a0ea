"""The options of the speed stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from quantline.config.section import Section


class LevelConfig(Section):
    """One point of the sweep: requests at a time, and requests in all."""

    concurrency: int = Field(ge=1)
    prompts: int = Field(ge=1)


class SpeedConfig(Section):
    """What vLLM's benchmark tools measure, see `quantline.evaluation.speed.run`; without tools nothing is measured.

    Attributes:
        name: of the group's file.
        tools: vLLM's.
        levels: of the sweep.
        input_tokens, output_tokens: length of a prompt and of its answer, which no end of text shortens.
        rounds: how often float and variant take turns.
        warmup_waves: before each measurement so many times `concurrency` requests are sent that do not count.
        seed: of the random prompts.
        enforce_eager: no graph capture; `auto` captures on a GPU only.
        side_by_side: whether both servers are up at once; `auto` does so where memory allows.
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
            raise ValueError("no levels to measure at; give speed.levels=[{concurrency: 1, prompts: 8}]")
        found = [level.concurrency for level in self.levels]
        if len(set(found)) != len(found):
            raise ValueError(f"levels {found}: a concurrency is there twice; give each once")
        return self


def speed_faults(values: Mapping[str, Any]) -> list[str]:
    """What the speed stage asks for and the server does not take."""
    speed, serve = values.get("speed"), values.get("serve")
    if not isinstance(speed, Mapping) or not isinstance(serve, Mapping) or not speed.get("tools"):
        return []
    prompt, answer, limit = speed.get("input_tokens"), speed.get("output_tokens"), serve.get("max_model_len")
    if not (isinstance(prompt, int) and isinstance(answer, int) and isinstance(limit, int)) or prompt + answer <= limit:
        return []
    return [
        f"speed.input_tokens={prompt} speed.output_tokens={answer}: the server takes serve.max_model_len={limit} tokens "
        "together; ask for fewer or raise that"
    ]
