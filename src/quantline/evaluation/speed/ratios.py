"""Rows and ratios from the rounds of a session."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quantline.evaluation.speed.vllm_bench import MEASURED

Row = Mapping[str, Any]


def medians(rounds: Sequence[Row]) -> list[dict[str, Any]]:
    """One row for each model and concurrency: the median of every measured value over the rounds."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rounds:
        groups.setdefault((row["model"], row["concurrency"]), []).append(row)
    return [
        {
            "model": model, "concurrency": concurrency, "rounds": len(rows),
            **{name: statistics.median(row[name] for row in rows) for name in MEASURED},
        }
        for (model, concurrency), rows in sorted(groups.items(), key=lambda item: item[0][1])
    ]  # fmt: skip


def ratios(rounds: Sequence[Row]) -> list[dict[str, Any]]:
    """The variant's tokens per second divided by the float model's, for each concurrency.

    Rounds are paired, so other load on the machine slows both models. `speed_up` is the geometric mean of the rounds'
    ratios; `low` and `high` are the smallest and the largest ratio. There are too few rounds for a confidence interval.
    slower_than_float: the variant was slower in every round.
    """
    found = []
    for concurrency in sorted({row["concurrency"] for row in rounds}):
        speeds = {
            model: [row["output_tokens_per_second"] for row in rounds if
                    (row["model"], row["concurrency"]) == (model, concurrency)]
            for model in ("float", "variant")
        }  # fmt: skip
        each = [mine / theirs for theirs, mine in zip(speeds["float"], speeds["variant"], strict=True)]
        mean = math.exp(statistics.fmean(math.log(value) for value in each))
        found.append({
            "concurrency": concurrency, "speed_up": mean, "low": min(each), "high": max(each), "rounds": len(each),
            "slower_than_float": max(each) < 1,
        })  # fmt: skip
    return found


def metrics_of(document: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a session, under names that end in their concurrency."""
    metrics: dict[str, float] = {}
    for row in document["rows"]:
        if row["model"] == "variant":
            at = f"c{row['concurrency']}"
            metrics[f"output_tokens_per_second_{at}"] = row["output_tokens_per_second"]
            metrics[f"ttft_ms_{at}"], metrics[f"itl_ms_{at}"] = row["ttft_ms_median"], row["itl_ms_median"]
    for ratio in document["ratios"]:
        metrics[f"speed_up_c{ratio['concurrency']}"] = ratio["speed_up"]
    for server in document["servers"]:
        prefix = "float_" if server["model"] == "float" else ""
        metrics[f"{prefix}weights_memory_bytes"] = float(server["weights_memory_bytes"])
    if document["ratios"]:
        metrics["slower_than_float"] = float(any(ratio["slower_than_float"] for ratio in document["ratios"]))
    return metrics
