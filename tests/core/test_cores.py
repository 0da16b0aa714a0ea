from __future__ import annotations

import os
import subprocess
import sys

from quantline.core.cores import cores, cores_in_use, tensors_at_once


def test_a_process_held_to_one_core_computes_one_tensor_at_a_time():
    before = os.sched_getaffinity(0)
    assert cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert (cores(), tensors_at_once()) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)


def test_many_cores_do_not_hold_a_tensor_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(128)))
    assert (cores(), tensors_at_once()) == (128, 8)


def test_cores_that_others_keep_busy_are_counted():
    """One process that computes is seen; this one, which waits meanwhile, adds nothing to it."""
    work = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert 0.5 < cores_in_use(1.0) <= (os.cpu_count() or 1)
    finally:
        work.kill()
        work.wait()
