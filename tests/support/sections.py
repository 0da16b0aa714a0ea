"""Sections of a configuration for tests: small values, and what a test says otherwise."""

from __future__ import annotations

from typing import Any

from quantline.config.data import CalibrationConfig, ModelConfig, SourceConfig
from quantline.config.evaluate import (
    BootstrapConfig,
    DivergenceConfig,
    EvaluateConfig,
    GenerationsConfig,
    ProtocolConfig,
    RestoreConfig,
)
from quantline.config.limits import LimitsConfig
from quantline.config.serve import ProcessConfig, SmokeConfig
from quantline.config.speed import LevelConfig, SpeedConfig
from quantline.config.tasks import GateConfig, LocalTasksConfig, TasksConfig
from quantline.serving.command import ServerOptions

_PROTOCOL = {
    "name": "test", "level": "token", "path": None, "format": None, "text_field": "text", "mode": "documents",
    "separator": "\n\n", "window": 512, "stride": 512, "bos": "none", "max_documents": None,
    "max_document_tokens": None, "max_tokens": None, "min_tokens": 2,
}  # fmt: skip
_PROCESS = {
    "host": "127.0.0.1", "port": None, "startup_timeout_seconds": 600.0, "request_timeout_seconds": 60.0,
    "kv_cache_gib": None, "gpu_memory_utilization": 0.9, "tensor_parallel_size": 1, "concurrency": 3, "extra_args": [],
}  # fmt: skip


def model(**values: Any) -> ModelConfig:
    """A model of nowhere; safetensors and no code of its own."""
    known = {"name": None, "repo": None, "revision": None, "path": None, "allow_pickle": False}
    return ModelConfig(**{**known, "trust_remote_code": False, **values})


def calibration(sources: dict[str, dict[str, Any]], **values: Any) -> CalibrationConfig:
    """Calibration of the values of sources by name."""
    known = {"name": "test", "path": None, "n_samples": 4, "seq_len": 16, "seed": 0, "chat_template": False}
    named = {name: SourceConfig(**{"weight": 1.0, **source}) for name, source in sources.items()}
    return CalibrationConfig(**{**known, "packing": "concat", "skip_empty": False, "sources": named, **values})


def bootstrap(**values: Any) -> BootstrapConfig:
    """10 000 resamples at 95 %."""
    return BootstrapConfig(**{"resamples": 10_000, "level": 0.95, "seed": 0, **values})


def protocol(**values: Any) -> ProtocolConfig:
    """Documents in windows of 512 tokens, without limits."""
    return ProtocolConfig(**{**_PROTOCOL, **values})


def generations(**values: Any) -> GenerationsConfig:
    """No continuations."""
    return GenerationsConfig(**{"prompts": 0, "prompt_tokens": 1, "new_tokens": 1, "tie_margin": 0.01, **values})


def limits(**values: Any) -> LimitsConfig:
    """No limits."""
    return LimitsConfig(**{**dict.fromkeys(LimitsConfig.model_fields), **values})


def evaluation(**values: Any) -> EvaluateConfig:
    """The protocol above; nothing but perplexity is measured, and nothing is limited."""
    known: dict[str, Any] = {
        "batch_tokens": 64, "bootstrap": bootstrap(resamples=200), "engine_tolerance": 0.01,
        "divergence": DivergenceConfig(tokens=0), "generations": generations(), "limits": limits(), "fail_on": [],
        "restore": RestoreConfig(layers=0, tokens=1000),
    }  # fmt: skip
    return EvaluateConfig(**{**_PROTOCOL, **known, **values})


def smoke(**values: Any) -> SmokeConfig:
    """Two prompts and a chat."""
    return SmokeConfig(**{"max_tokens": 3, "prompts": ["Tell me", "Say"], "chat_prompts": ["Hello?"], **values})


def server(**values: Any) -> ServerOptions:
    """A server on this machine; options of the process are given beside the others."""
    process = {key: values.pop(key) for key in list(values) if key in ProcessConfig.model_fields}
    return ServerOptions(ProcessConfig(**{**_PROCESS, **process}), **values)


def speed(*levels: tuple[int, int], **values: Any) -> SpeedConfig:
    """`vllm bench serve` at levels of (concurrency, prompts)."""
    known = {
        "name": "test", "tools": ["serve"], "input_tokens": 64, "output_tokens": 32, "rounds": 2, "warmup_waves": 1,
        "seed": 0, "enforce_eager": "auto", "side_by_side": "auto",
        "levels": [LevelConfig(concurrency=concurrency, prompts=prompts) for concurrency, prompts in levels],
    }  # fmt: skip
    return SpeedConfig(**{**known, **values})


def gate(min_recovery: float | None = None, judged_by: str = "high", on_failure: str = "warn") -> GateConfig:
    """A gate that everything passes."""
    return GateConfig.model_validate({"min_recovery": min_recovery, "judged_by": judged_by, "on_failure": on_failure})


def tasks(**values: Any) -> TasksConfig:
    """No task, asked of the reference engine."""
    known = {
        "name": "test", "engines": ["reference"], "path": "text.jsonl", "format": None, "text_field": "text", "seed": 0,
        "limit": None, "local": LocalTasksConfig(last_word=None, multiple_choice=None), "standard": {}, "download": False,
        "batch_size": 8, "bootstrap": bootstrap(resamples=500), "gate": gate(),
    }  # fmt: skip
    return TasksConfig(**{**known, **values})
