"""What `stages.noise` measured of a variant, for the evaluation that judges it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantline.results import read_result


def noise_floor(root: Path, fingerprint_of: Callable[[int], str]) -> dict[str, Any] | None:
    """How much of the loss is chance: over runs with other seeds, what the variant lost in nats a token of the same text.

    Args:
        root: the checkout; runs by hand are in its scratch/.
        fingerprint_of: from a number of runs, what a noise result of this variant and text has.

    Returns:
        runs, low and high (smallest and largest nll_difference), seeds, and the result's output_hash; None where it was not
        measured.
    """
    for path in sorted((root / "scratch").glob("*/noise.json")):
        result = read_result(path)
        rows = result.get("tables", {}).get("runs", [])
        if rows and result.get("fingerprint") == fingerprint_of(len(rows)):
            lost = [float(row["nll_difference"]) for row in rows]
            return {
                "runs": len(rows), "low": min(lost), "high": max(lost), "seeds": [row["seed"] for row in rows],
                "unit": "nats/token", "output_hash": result["output_hash"],
            }  # fmt: skip
    return None
