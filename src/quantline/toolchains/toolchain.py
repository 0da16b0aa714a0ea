"""The interpreter of another environment, and the environment variables of its workers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def _source_path() -> Path:
    """A folder that holds this package and nothing else, for the path of workers.

    The packages beside an installed one are those of the pipeline's environment, and must not meet a worker's own.
    """
    if _PACKAGE.parent.name == "src":
        return _PACKAGE.parent
    folder = Path(tempfile.mkdtemp(prefix="quantline-source-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / _PACKAGE.name).symlink_to(_PACKAGE, target_is_directory=True)
    return folder


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
        PYTHONPATH=str(_source_path()),
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
