"""Whether a fleet leaves a process behind: `python -m benchmarks.fleet_updown [--times 100]`.

A fleet of three fakes is brought up and ended again and again, every third time by kill -9 of its parent, every third by
SIGTERM, and else by an order. After each, no process of it may be left.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

PARENT = """
import sys, pathlib
import fake_fleet
with fake_fleet.up(pathlib.Path(sys.argv[1])) as running:
    print("up", flush=True)
    running.stay()
"""


def main() -> int:
    from quantline.serving.fleet.orders import Order, give

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    times = parser.parse_args().times
    left, slowest = 0, 0.0
    for number in range(times):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", PARENT, folder]
            variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables, text=True
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            below = psutil.Process(process.pid).children(recursive=True)
            started = time.monotonic()
            if number % 3 == 0:
                process.send_signal(signal.SIGKILL)
            elif number % 3 == 1:
                process.send_signal(signal.SIGTERM)
            else:
                give(Path(folder) / "state", Order(number=number + 1, end=True))
            process.wait()
            alive = psutil.wait_procs(below, timeout=20)[1]
            slowest = max(slowest, time.monotonic() - started)
            left += len(alive)
            for one in alive:
                one.kill()
    print(f"{times} times up and down, a third each by kill -9, SIGTERM and an order: {left} processes left; "
          f"the slowest end took {slowest:.1f} s")  # fmt: skip
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
