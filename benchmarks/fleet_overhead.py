"""What the router adds to a request: `python -m benchmarks.fleet_overhead [--requests 500] [--rounds 6] [--soak 20000]`.

Requests go to a fake server directly and through the router in turns, one at a time and eight at a time; the medians of the
rounds' medians are compared. CPU is the router's own, from the kernel, over all requests through it. The soak sends many
more and prints the router's resident memory on the way. On a shared machine CPU seconds are more reliable than latencies.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]


def main() -> int:
    import fake_fleet

    from quantline.serving.fleet.load import Load, run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--soak", type=int, default=20_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fake_fleet.up(Path(folder)) as running:
        assert running.router.child is not None
        router = psutil.Process(running.router.child.pid)
        direct = f"http://{running.fleet.variant('w4').address}"

        def used() -> float:
            return sum(router.cpu_times()[:2])

        def medians(concurrency: int) -> None:
            found: dict[str, list[float]] = {"direct": [], "router": []}
            before, through = used(), 0
            for number in range(given.rounds + 1):
                for name, url, model in (("direct", direct, "w4"), ("router", running.fleet.url, "low")):
                    outcome = run(Load(url, model, given.requests, concurrency))
                    through += given.requests if name == "router" else 0
                    if number:  # the first round warms up
                        found[name].append(outcome.quantile(0.5))
            bare, routed = (statistics.median(found[name]) * 1000 for name in ("direct", "router"))
            each = (used() - before) / through * 1000
            print(f"{concurrency} at a time: direct {bare:.2f} ms, through the router {routed:.2f} ms, added "
                  f"{routed - bare:+.2f} ms at the median; {each:.2f} ms of CPU a request; "
                  f"{router.memory_info().rss / 2**20:.0f} MiB", flush=True)  # fmt: skip

        medians(1)
        medians(8)
        sizes = []
        for _ in range(5):
            run(Load(running.fleet.url, "low", given.soak // 5, 16, streamed=0.25))
            sizes.append(router.memory_info().rss / 2**20)
        print(f"{given.soak} more requests: {', '.join(f'{size:.1f}' for size in sizes)} MiB after each fifth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
