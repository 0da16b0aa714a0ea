"""How a server is started for a checkpoint: the options, its arguments and environment, and the line for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from quantline.serving import llamacpp
from quantline.serving.memory import GIB
from quantline.serving.server_options import SERVED_NAME, ServerOptions

__all__ = [
    "SERVED_NAME", "TEXT_ONLY", "ServerOptions", "command_line", "environment_of", "flags_of", "served_line", "title_of",
]  # fmt: skip

TEXT_ONLY = "--language-model-only"


def command_line(python: Path, model: Path, options: ServerOptions, port: int) -> list[str]:
    """The arguments that start the server."""
    if options.runtime == llamacpp.NAME:
        return llamacpp.command_line(python, model, options, port)
    return [
        str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--served-model-name", options.name, "--host", options.process.host, "--port", str(port),
        "--disable-uvicorn-access-log", *flags_of(options),
    ]  # fmt: skip


def title_of(runtime: str) -> str:
    """What people call a server."""
    return "llama.cpp" if runtime == llamacpp.NAME else "vLLM"


def served_line(model: str, options: ServerOptions) -> str:
    """The line of a shell that serves a checkpoint as this project does, on the server's own address and under its own name.

    model: a folder, or a repository on the hub.
    """
    if options.runtime == llamacpp.NAME:
        return llamacpp.line(model, options)
    return shlex.join(["vllm", "serve", model, *flags_of(options)])


def flags_of(options: ServerOptions) -> list[str]:
    """The arguments that decide what is served and how, the same for every address and name."""
    if options.proven is not None:
        return list(options.proven)
    if options.runtime == llamacpp.NAME:
        return llamacpp.flags_of(options)
    flags = [
        "--dtype", options.dtype, "--tensor-parallel-size", str(options.process.tensor_parallel_size),
        # The checkpoint's own sampling defaults (such as a repetition penalty) would change greedy answers.
        "--generation-config", "vllm",
        # A cached prompt takes another path through the kernels and may give another greedy answer.
        "--enable-prefix-caching" if options.process.enable_prefix_caching else "--no-enable-prefix-caching",
    ]  # fmt: skip
    if options.max_model_len is not None:
        flags += ["--max-model-len", str(options.max_model_len)]
    if options.process.kv_cache_gib is not None:
        flags += ["--kv-cache-memory-bytes", str(int(options.process.kv_cache_gib * GIB))]
    if options.device == "cuda":
        flags += ["--gpu-memory-utilization", str(options.process.gpu_memory_utilization)]
    process = options.process
    for flag, value in (
        ("--max-num-seqs", process.max_num_seqs), ("--max-num-batched-tokens", process.max_num_batched_tokens),
        ("--block-size", process.block_size), ("--cpu-offload-gb", process.cpu_offload_gib),  # GiB, as vLLM counts
        ("--kv-offloading-size", process.kv_offload_gib), ("--attention-backend", process.attention_backend),
    ):  # fmt: skip
        if value:
            flags += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    if options.kv_cache_dtype != "auto":
        flags += ["--kv-cache-dtype", options.kv_cache_dtype]
    if options.enforce_eager:
        flags.append("--enforce-eager")
    if options.trust_remote_code:
        flags.append("--trust-remote-code")
    if options.text_only:
        flags.append(TEXT_ONLY)
    return [*flags, *options.process.extra_args]


def environment_of(options: ServerOptions) -> dict[str, str]:
    """The environment variables of the server, beside those of every worker."""
    if options.runtime == llamacpp.NAME:
        return {}
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "NO_COLOR": "1"}
    if options.device == "cpu" and options.threads is not None:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if options.device == "cpu" and options.enforce_eager:
        # Otherwise vLLM still compiles the ranking of log-probabilities: 17 s of C++ at the first scoring request.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    return variables
