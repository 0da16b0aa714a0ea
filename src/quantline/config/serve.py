"""Options of the server."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantline.config.section import Section


class SmokeConfig(Section):
    """The fixed greedy requests of the smoke test."""

    max_tokens: int = Field(ge=1)
    prompts: list[str] = Field(min_length=1)
    chat_prompts: list[str]


class ProcessConfig(Section):
    """How the server runs on this machine; not part of a variant's identity."""

    host: str
    port: int | None = Field(ge=1, le=65535)
    startup_timeout_seconds: float = Field(gt=0)
    request_timeout_seconds: float = Field(gt=0)
    kv_cache_gib: float | None = Field(gt=0)
    gpu_memory_utilization: float = Field(gt=0, le=1)
    tensor_parallel_size: int = Field(ge=1)
    concurrency: int = Field(ge=1)
    extra_args: list[str]
    # With defaults, since configurations that were frozen before do not have them.
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    block_size: int | None = Field(default=None, ge=1)
    enable_prefix_caching: bool = False
    cpu_offload_gib: float = Field(default=0, ge=0)
    kv_offload_gib: float = Field(default=0, ge=0)
    attention_backend: str | None = Field(default=None, pattern=r"^[A-Z0-9_]+$")


# What vLLM 0.32 calls the types of a KV cache (CacheDType) that any model can have.
KvCacheDtype = Literal[
    "auto", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head", "nvfp4"
]


class ServeConfig(Section):
    """The server and its smoke test."""

    runtime: Literal["vllm"]
    max_model_len: Annotated[int, Field(ge=16)] | Literal["auto"]
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    enforce_eager: bool
    # With a default, since configurations that were frozen before do not have it.
    kv_cache_dtype: KvCacheDtype = "auto"
    smoke: SmokeConfig
    process: ProcessConfig

    @property
    def length(self) -> int:
        """The context length, after `auto` was replaced; see `quantline.config.context`."""
        assert self.max_model_len != "auto"
        return self.max_model_len
