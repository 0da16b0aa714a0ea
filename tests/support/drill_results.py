"""A result of the fault drill of a fleet, as `fleet_smoke` writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quantline.serving.fleet.drill import Row, metrics


def drill(variants: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Two faults, of which the second cost a request. variants: hashes of their checkpoints by name."""
    rows = [
        Row("kill -9", 100, 0, 0, 0, 3, 60, 0.2, 1.1, 41.0, {}),
        Row("queue full", 100, 1, 0, 0, 50, 50, 0.4, 2.1, None, {"503": 1}),
    ]
    return {
        "status": "lost", "precision": "low", "chain": list(variants), "device": "cpu", "router": "abc/1.40.0",
        "variants": {name: {"content": content, "runtime": "vllm"} for name, content in variants.items()},
        "metrics": dict(metrics(rows)), "rows": [asdict(row) for row in rows], "started_at": 1.0, "seconds": 90.0, **changes,
    }  # fmt: skip
