"""The sampler beside a stage: what it sees, how much it keeps, and that nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from quantline.pipeline.monitor import monitor
from quantline.pipeline.monitor.monitor import Monitor

BASE = ["seconds", "cpu_percent", "rss_bytes", "system_memory_used_bytes", "system_memory_total_bytes"]
# A process below this one that holds 200 MB and keeps a core busy.
BUSY = "import time\nheld = bytearray(200_000_000)\nend = time.time() + 1.5\nwhile time.time() < end: pass"

# A stage at work.
OWNER = """
import time
from quantline.pipeline.monitor.monitor import Monitor
with Monitor(0.1):
    print("up", flush=True)
    time.sleep(60)
"""


def column(series, name):
    at = series["columns"].index(name)
    return [row[at] for row in series["samples"]]


def test_the_series_holds_what_the_whole_tree_uses_with_its_ends_and_peak():
    with Monitor(interval_seconds=0.05, most_rows=20) as watching:
        assert threading.active_count() == 1 or threading.current_thread() is threading.main_thread()
        subprocess.run([sys.executable, "-c", BUSY], check=True)
        series = watching.finish()
    assert series["columns"][: len(BASE)] == BASE
    assert 5 <= len(series["samples"]) <= 20
    seconds = column(series, "seconds")
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    assert seconds[-1] > 1.4
    assert series["interval_seconds"] > 0.05  # it was thinned out
    assert series["peak"]["rss_bytes"] > 200e6 + series["after"]["rss_bytes"] * 0.5
    assert series["peak"]["cpu_percent"] > 10
    assert series["after"]["rss_bytes"] == column(series, "rss_bytes")[-1]
    assert series["before"]["rss_bytes"] == column(series, "rss_bytes")[0]
    total = psutil.virtual_memory().total
    assert set(column(series, "system_memory_total_bytes")) == {total}
    assert all(0 < used < total for used in column(series, "system_memory_used_bytes"))


def test_it_starts_no_thread_here_and_leaves_no_process():
    threads, before = threading.active_count(), set(psutil.Process().children())
    with Monitor(interval_seconds=0.05) as watching:
        (sampler,) = set(psutil.Process().children()) - before
        assert threading.active_count() == threads
        assert len(watching.finish()["samples"]) >= 1
    assert not sampler.is_running()


def test_a_block_that_raises_leaves_no_process():
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="work failed"), Monitor():
        raise ValueError("work failed")
    assert set(psutil.Process().children()) == before


def test_a_sampler_that_cannot_start_or_dies_gives_an_empty_series(monkeypatch):
    with Monitor() as watching:
        for child in psutil.Process().children():
            if "sampler.py" in " ".join(child.cmdline()):
                child.kill()
        assert watching.finish() == {}
    monkeypatch.setattr(monitor.sys, "executable", "/no/such/python")
    with Monitor() as watching:
        assert watching.finish() == {}


def test_a_sampler_ends_when_the_stage_is_killed():
    path = str(Path(monitor.__file__).parents[3])
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as stage:
        assert stage.stdout.readline() == b"up\n"
        (sampler,) = psutil.Process(stage.pid).children()
        time.sleep(0.3)
        stage.kill()
    assert psutil.wait_procs([sampler], timeout=5)[1] == []
