"""A worker that is started before its job is known: it imports while another one computes, and then waits.

It holds no model while it waits, some 350 MB for torch and transformers. Where nobody asks it, it ends with the block.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantline import toolchains
from quantline.jobs import WAIT, JobResult, write_json

Ask = Callable[[Mapping[str, Any], str], JobResult]


@contextmanager
def early_worker(
    toolchain: toolchains.Toolchain,
    module: str,
    *,
    log: Path,
    threads: int,
    extra_environment: Mapping[str, str] | None = None,
) -> Iterator[Ask]:
    """Start `python -m module --wait`; what is yielded gives it its job, once, and returns the result.

    Args:
        toolchain, module, log, threads, extra_environment: as of `toolchains.run_worker`, whose errors the given function
            raises.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantline-job-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        command = [str(toolchain.python), "-m", module, str(job_path), str(result_path), WAIT]
        variables = toolchains.worker_environment(threads, extra_environment)
        process = toolchains.start_logged(command, variables, stdin=subprocess.PIPE)

        def ask(job: Mapping[str, Any], label: str) -> JobResult:
            write_json(job_path, dict(job))
            _tell(process)
            code, step = toolchains.follow(process, log, label)
            return toolchains.read_result(result_path, code, log, f"{module.rsplit('.', 1)[-1]} worker", step)

        try:
            yield ask
        finally:
            if process.poll() is None:
                toolchains.end_group(process)


def _tell(process: toolchains.Process) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("go\n")
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended: what is told of it are its log and its exit code
