"""A real MLflow server on loopback for the time of a block."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantline.toolchains.runner import end_group


@contextmanager
def running(folder: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[Any]]:
    """`mlflow <arguments>` on the store `mlflow.db` in `folder`, once it answers."""
    command = [
        sys.executable, "-m", "mlflow", *arguments, "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    variables = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.1)
        yield process
    finally:
        end_group(process)
