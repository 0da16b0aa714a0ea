"""The options of the speed stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from quantline.config.section import Section

QUESTIONS = (
    "What is an index?", "Explain how a function is called.", "What does a transaction do?", "What is a list?",
    "How is a table sorted?",
)  # fmt: skip
# Options of runtime=transformers alone.
OF_LIBRARY = ("attention", "fuse", "fuse_max_seq_len", "questions", "max_tokens")
FUSED_AND_ATTENTION = (
    "{fuse} {attention}: exclude each other, since fused modules have an attention of their own; leave one out"
)


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
        runtime: `vllm` measures by vLLM's tools; `transformers` asks questions in a row by the checkpoint's own library.
        attention, fuse, fuse_max_seq_len, questions, max_tokens: of `transformers`, see `evaluation.speed.own_library`.
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
    runtime: Literal["vllm", "transformers"] = "vllm"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    fuse: bool = False
    fuse_max_seq_len: int = Field(default=4096, ge=1)
    questions: list[str] = Field(default=list(QUESTIONS), min_length=1)
    max_tokens: int = Field(default=64, ge=1)

    @property
    def by_server(self) -> bool:
        """Whether a server of vLLM is measured."""
        return self.runtime == "vllm" and "serve" in self.tools

    def identity(self) -> dict[str, Any]:
        """The values that decide a result; those of the other runtime have no part in it."""
        if self.runtime == "vllm":
            return self.model_dump(exclude={"runtime", *OF_LIBRARY})
        return self.model_dump(include={"runtime", *OF_LIBRARY})

    def library_faults(self) -> list[str]:
        """What of the options of `transformers` cannot be given together, whatever the machine and the checkpoint."""
        given = [
            f"speed.{name}={str(value).lower()}" for name in ("attention", "fuse") if (value := getattr(self, name))
        ]
        if given and self.runtime == "vllm":
            return [f"{' '.join(given)}: vLLM does not take it; give speed.runtime=transformers, or leave it out"]
        if self.fuse and self.attention:
            return [FUSED_AND_ATTENTION.format(fuse="speed.fuse=true", attention=f"speed.attention={self.attention}")]
        return []

    @model_validator(mode="after")
    def _levels(self) -> SpeedConfig:
        if self.tools and not self.levels:
            raise ValueError("there are no levels to measure; give speed.levels=[{concurrency: 1, prompts: 8}]")
        concurrencies = [level.concurrency for level in self.levels]
        if len(set(concurrencies)) != len(concurrencies):
            raise ValueError(f"levels {concurrencies}: a concurrency is given twice; give each once")
        return self
