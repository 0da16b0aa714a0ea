"""The time of publishing to a new SQLite store: `python -m benchmarks.publish [variants=10]`.

The results are those of the tests: every stage of every variant with a file, two datasets, and 100 samples of system
metrics per stage. It prints the times of creating the database, the first publish, a publish without changes, and a publish
after one stage of each variant was measured again.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]


def main(variants: int) -> None:
    from variant_records import record

    from quantline.lifecycle.tracking.writer import publish

    monitor = {
        "interval_seconds": 1.0, "columns": ["seconds", "cpu_percent", "rss_bytes", "memory_used_bytes"],
        "samples": [[float(at), 150.0 + at % 7, 1e9 + at, 2e9 + at] for at in range(100)],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="quantline-benchmark-") as scratch:
        root = Path(scratch)
        records = [record(f"gptq-w4-{at}", "gptq", 4, 0.01 + at / 1000, root / "work") for at in range(variants)]
        for variant in records:
            for result in variant.results:
                result["monitor"] = monitor
        again = [replace(variant, results=deepcopy(variant.results)) for variant in records]
        for variant in again:
            evaluated = next(result for result in variant.results if result["stage"] == "evaluate")
            evaluated["metrics"]["reference_perplexity"] += 1
        for what, given in (("database", []), ("first", records), ("unchanged", records), ("one stage new", again)):
            begun = time.monotonic()
            report = publish(given, tracking_uri=f"sqlite:///{root}/mlflow.db", experiment="benchmark", root=root)
            counts = f"{len(report.created)} new, {len(report.unchanged)} unchanged"
            print(f"{what:14} {time.monotonic() - begun:6.2f} s   {counts}")


if __name__ == "__main__":
    given = re.fullmatch(r"variants=([1-9]\d*)", " ".join(sys.argv[1:]) or "variants=10")
    if given is None:
        print(__doc__, flush=True)
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else f"{' '.join(sys.argv[1:])}: give variants=NUMBER")
    main(int(given[1]))
