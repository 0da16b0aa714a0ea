"""How a model is served, whatever the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantline.config.serve import ProcessConfig
from quantline.toolchains import protocol

SERVED_NAME = protocol.SERVED_NAME


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served.

    Attributes:
        process: the configuration's section: address, timeouts, memory, further arguments.
        device: `cpu` or `cuda`.
        dtype: of the activations, as vLLM names it; quantized checkpoints take `float16` and `bfloat16`.
        max_model_len: tokens of prompt and answer together; None takes the model's own limit.
        enforce_eager: no graph capture.
        trust_remote_code: run the Python code that a model brings.
        text_only: of a model that takes images, too, serve the language model alone.
        kv_cache_dtype: of the keys and values that are kept.
        threads: OpenMP threads of a CPU worker, not bound to cores. None lets vLLM bind them to all cores but one, which
            was the fastest setting tried on two busy cores.
        environment: further environment variables of the server.
        name: under which requests ask for the model.
        proven: the flags with which it was served before, in place of those that follow from the options above.
        runtime: the server, `vllm` or `llamacpp`.
    """

    process: ProcessConfig
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    enforce_eager: bool = True
    trust_remote_code: bool = False
    text_only: bool = False
    threads: int | None = None
    kv_cache_dtype: str = "auto"
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = SERVED_NAME
    proven: tuple[str, ...] | None = None
    runtime: str = "vllm"
