"""Calls of one function shared out over forked copies of this process: NumPy on small blocks gains little from threads.

A worker inherits everything by the fork; it is sent the number of a job, one ahead of the job it works on, and sends back
what came of it. It ends when this process does, however that ends. Its exceptions are raised here as what they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from quantline.errors import QuantlineError, WorkerError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

_PR_SET_PDEATHSIG = 1
# Options of glibc's malloc: keep freed memory instead of giving it back and faulting it in again a moment later.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _KEPT = -1, -4, 1 << 30
_STOP = (signal.SIGINT, signal.SIGTERM)
# Jobs that a worker has been given: the one it works on and the next.
_AHEAD = 2


def can_fork() -> bool:
    """Whether a fork is safe: no other thread could hold a lock at that moment."""
    return sys.platform == "linux" and threading.active_count() == 1 and not multiprocessing.current_process().daemon


def forked(
    function: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int
) -> Generator[tuple[Job, Outcome], None, None]:
    """Call the function with every job, in so many processes; gives jobs and outcomes as they come.

    The workers start with the first outcome that is asked for, and are gone when the iterator is closed or has raised.

    Raises:
        WorkerError: a worker was killed.
        Exception: what the function raised.
    """
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    busy: dict[Any, int] = {}
    try:
        # An interrupt while a worker is half made would show up there; it is kept back until all are made.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        try:
            for _ in range(min(workers, len(jobs))):
                end, other = context.Pipe()
                ours = [*busy, end]
                processes.append(context.Process(target=_serve, args=(function, jobs, other, ours, os.getpid())))
                processes[-1].daemon = True
                processes[-1].start()
                other.close()
                busy[end] = 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        numbers = iter(range(len(jobs)))
        for end in [*busy] * _AHEAD:
            _give(end, busy, numbers)
        while any(busy.values()):
            ready: list[Any] = wait([end for end, given in busy.items() if given])
            for end in ready:
                number, value, failed = _received(end)
                if failed:
                    raise value
                busy[end] -= 1
                _give(end, busy, numbers)
                yield jobs[number], value
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for end in busy:
            end.close()


def _give(end: Any, busy: dict[Any, int], numbers: Iterator[int]) -> None:
    with contextlib.suppress(StopIteration, OSError):  # a worker that is gone shows when it is heard
        end.send(next(numbers))
        busy[end] += 1


def _received(end: Connection) -> tuple[int, Any, bool]:
    try:
        number, value, failed = end.recv()
    except (EOFError, OSError, pickle.UnpicklingError):
        raise WorkerError(
            "a worker of the conversion was killed, perhaps for want of memory; nothing was kept; run it again"
        ) from None
    return number, value, failed


def _serve(
    function: Callable[[Job], Outcome], jobs: Sequence[Job], end: Connection, others: list[Connection], parent: int
) -> None:
    for stop in _STOP:  # sent to the whole group; the parent ends its workers
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before that
        return
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_MAX, 0)
    for other in others:
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            number = end.recv()
            try:
                answer: tuple[int, Any, bool] = (number, function(jobs[number]), False)
            except Exception as error:  # it is raised again in the parent
                answer = (number, _portable(error), True)
            end.send(answer)


def _portable(error: Exception) -> Exception:
    """The exception as it can be sent; one that is a fault of ours with the place it comes from."""
    if not isinstance(error, (QuantlineError, OSError)):
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (its own)
        return error
    except Exception:  # an exception may be anything
        return WorkerError(f"{type(error).__name__}: {error}")
