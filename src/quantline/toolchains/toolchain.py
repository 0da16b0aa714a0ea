"""The interpreter of another environment, and the environment variables of its workers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolchain:
    """A working interpreter. `lock_sha256` is None if the user named the interpreter."""

    name: str
    python: Path
    lock_sha256: str | None


def worker_environment(threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables of a worker: no network access, a fixed number of threads, reproducible arithmetic.

    The number of OpenMP threads changes the weights, so it is part of a variant's identity. Tokens for hubs and tracking
    servers are removed: a worker needs none, and its log is kept.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW_", "DVC_"))}
    for secret in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        variables.pop(secret, None)
    variables.update(
        PYTHONPATH=str(Path(__file__).resolve().parents[2]),
        PYTHONHASHSEED="0",
        PYTHONUNBUFFERED="1",
        PYTHONWARNINGS="ignore",
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="PASSIVE",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",  # a library's bar does not end its line, so the worker's own progress lines would be lost
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    variables.update(extra or {})
    return variables
