"""The server of a stage that serves: its interpreter, its version, and how it is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantline.toolchains.environments import distribution_version

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun
    from quantline.serving.server import ServerOptions


def server_of(run: StageRun) -> tuple[Path, str]:
    """Interpreter and version of the server's environment, which becomes the stage's."""
    chosen = run.toolchain("vllm")
    version = distribution_version(chosen, "vllm")
    run.environment.update(toolchain="vllm", lock_sha256=chosen.lock_sha256, versions={"vllm": version})
    return chosen.python, version


def server_options(run: StageRun, *, quantized: bool) -> ServerOptions:
    """How the server is started for a checkpoint."""
    from quantline.serving.rules import serving_dtype
    from quantline.serving.server import ServerOptions

    serve = run.config.serve
    process = serve.process.model_dump(exclude={"concurrency", "request_timeout_seconds", "extra_args"})
    return ServerOptions(
        device=run.device, dtype=serving_dtype(serve.dtype, quantized=quantized), max_model_len=serve.max_model_len,
        enforce_eager=serve.enforce_eager, trust_remote_code=run.config.model.trust_remote_code,
        extra_args=tuple(serve.process.extra_args), **process,
    )  # fmt: skip
