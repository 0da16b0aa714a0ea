"""What faults cost a fleet: `python -m benchmarks.fleet_drill [--requests 1000] [--concurrency 8] [--faults ...]`.

Three fake servers stand behind the real router, gauge and supervisors, since faults come on order there: kill -9, a hang,
floods of 500, 429 and 503, documents that are moved into place, a canary that is moved, a variant that is drained, and the
gauge killed. Every second answer is streamed. The table says how many requests were lost before the first byte, and how many
streams broke after it (with an error: none ends quietly). `stages.fleet_smoke` is the same for real servers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]


def main() -> int:
    import fake_fleet

    from quantline.serving.fleet.drill import FAKED, Drill, table
    from quantline.serving.fleet.load import Load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--faults", nargs="*", default=list(FAKED))
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, fake_fleet.up(Path(folder)) as running:
        load = Load(running.fleet.url, "low", given.requests, given.concurrency, streamed=0.5)
        for row in Drill(running, load, fake_fleet.order(running)).rows(tuple(given.faults)):
            print(f"{row.fault}: {row.lost} lost", file=sys.stderr)
            rows.append(row)
    print(table(rows))
    return int(any(row.lost or row.quiet for row in rows))


if __name__ == "__main__":
    sys.exit(main())
