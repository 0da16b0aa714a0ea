"""One job on several GPUs: one process a GPU.

The worker that the pipeline starts has rank 0, and starts one more process for each further GPU: the same module on the
same job, with its own `rank`. A job without `gpus` has one process, and none of this applies to it.

The processes find each other by a file, and talk over loopback or GPU memory, so that no port is open to the network. If one
of them fails, the whole job ends with its message; rank 0 would otherwise wait for ever for its part. If rank 0 ends, the
others are ended by the system, see `protocol.worker_main`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from quantline.core.files import write_json
from quantline.toolchains.protocol import abandon

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# Rank 0 reads and checks the model while the others wait for it, which takes long for a large one.
_PATIENCE = timedelta(hours=12)
_WATCHED_EVERY, _AFTERMATH = 0.2, 3.0  # seconds


@dataclass
class Team:
    """The processes of one job.

    Attributes:
        size: how many there are.
        rank: which one this is; 0 writes the output.
        folder: for files that the others leave to rank 0; None if there are no others.
    """

    size: int = 1
    rank: int = 0
    folder: Path | None = None
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def share(self) -> slice:
        """Every `size`-th item, which is this rank's part."""
        return slice(self.rank, None, self.size)

    def device(self, kind: str) -> str:
        """This rank's device: `cuda:k` of several GPUs, else `kind` (cpu or cuda)."""
        return f"cuda:{self.rank}" if self.size > 1 and kind == "cuda" else kind

    def connect(self, device: str) -> None:
        """Join torch's process group, by NCCL on GPUs and by gloo on CPUs. Rank k computes on the k-th GPU."""
        if self.folder is None:
            return
        import torch
        import torch.distributed as dist

        if device == "cuda":
            torch.cuda.set_device(self.rank)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", init_method=f"file://{self.folder}/group", rank=self.rank,
            world_size=self.size, timeout=_PATIENCE,
        )  # fmt: skip

    def results(self) -> list[dict[str, Any]]:
        """What the others returned, by rank, when all of them have ended."""
        found = []
        for rank, process in enumerate(self.others, 1):
            if process.wait() != 0:
                threading.Event().wait()  # the watching thread ends this process
            result = json.loads(_files(self.folder, rank)[1].read_text(encoding="utf-8"))
            found.append(dict(result["data"]))
        return found


@contextmanager
def team(module: str, job: Mapping[str, Any], folder: Path) -> Iterator[Team]:
    """The team of a job; rank 0 starts the others, and they have ended when the block ends.

    Args:
        module: the worker's, which `python -m` runs.
        job: with `gpus`, the number of processes. The others get it with `rank` and `ranks` (their folder).
        folder: where rank 0 keeps the team's files; it is made, and removed at the end.
    """
    size = int(job.get("gpus") or 1)
    if size == 1:
        yield Team()
        return
    os.environ.update(_LOOPBACK)
    if job.get("rank"):
        yield Team(size, int(job["rank"]), Path(job["ranks"]))
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ranks-", dir=folder) as made:
        found = Team(size, 0, Path(made))
        found.others = [_start(module, {**job, "rank": rank, "ranks": made}) for rank in range(1, size)]
        done = threading.Event()
        threading.Thread(target=_watch, args=(found, done), daemon=True).start()
        try:
            yield found
        except Exception:
            # The cause may lie in another rank, whose connection has broken.
            done.wait(_AFTERMATH)
            raise
        finally:
            done.set()
            for process in found.others:
                process.kill()
                process.wait()


def _files(folder: Path | None, rank: int) -> tuple[Path, Path, Path]:
    """The job, the result and the log of another rank."""
    assert folder is not None
    return folder / f"job.{rank}.json", folder / f"result.{rank}.json", folder / f"log.{rank}"


def _start(module: str, job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    path, result, log = _files(Path(job["ranks"]), int(job["rank"]))
    write_json(path, dict(job))
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(path), str(result)], stdin=subprocess.DEVNULL, stdout=sink,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def _watch(found: Team, done: threading.Event) -> None:
    """End this process with the message of the first of the others that fails."""
    while not done.wait(_WATCHED_EVERY):
        for rank, process in enumerate(found.others, 1):
            if process.poll():
                kind, message = _failure(found, rank, process.returncode)
                abandon(kind, message)


def _failure(found: Team, rank: int, code: int) -> tuple[str, str]:
    _, result, log = _files(found.folder, rank)
    print(f"--- log of rank {rank}", log.read_text(encoding="utf-8", errors="replace"), sep="\n", flush=True)
    try:
        told = json.loads(result.read_text(encoding="utf-8"))
        return str(told["kind"]), str(told["message"])
    except (OSError, ValueError, KeyError):
        ending = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return "internal", f"rank {rank} of {found.size} {ending}"
