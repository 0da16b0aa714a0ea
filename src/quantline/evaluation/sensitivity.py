"""Where a variant's loss comes from: errors of its linears by layer and kind of module, and the loss of the worst ones.

The quantize stage's errors of each linear (`coverage/layers.csv`) are summarized. If the evaluation measured the linears
again, on the checkpoint that it evaluates, the two measurements are compared. The worst linears are restored to float one
at a time; the drop of the loss is their share of it.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.config.evaluate import BootstrapConfig
from quantline.data.windows import Windows
from quantline.evaluation.bootstrap import paired_bootstrap
from quantline.evaluation.perplexity import document_sums

TABLE = "coverage/layers.csv"
SUMMARY, RESTORED, STATES = "layer_errors.csv", "restored.csv", "state_errors.csv"
RESTORED_COLUMNS = (
    "name", "layer", "module", "output_error", "nll_difference_restored", "recovered_nll", "recovered_low",
    "recovered_high", "recovered_share", "kl_restored", "recovered_kl_share", "note",
)  # fmt: skip
_NUMBERS = ("held_error", "rounding_error", "output_error", "weight_error", "weight_error_max", "weight_error_mean")
_PEERS = 3
_EXPERT = re.compile(r"experts\.\d+\.")
_LEVELS = ("low", "moderate", "high")
Row = dict[str, Any]


def read_layers(folder: Path) -> list[Row]:
    """The rows of a quantize output's table, errors as numbers; empty if there is no table, or it has no errors."""
    path = folder / TABLE
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        row.update({key: float(row[key]) if row.get(key) else None for key in _NUMBERS}, layer=int(row["layer"]))
    return [row for row in rows if row["weight_error"] is not None]


def summarize(rows: Sequence[Row]) -> list[Row]:
    """A row for each layer and for each kind of module.

    by ("layer" or "module"), key, linears, output_error_max, output_error_mean, weight_error_relative_max and
    weight_error_relative_mean (of ||W'-W||/||W||), weight_error_max and weight_error_mean (of |W'-W|), low, moderate, high
    (number of linears of that level) and worst, the name of the linear with the largest output error.
    """
    found = []
    for by in ("layer", "module"):
        for key in sorted({_kind(row[by]) for row in rows}):
            group = [row for row in rows if _kind(row[by]) == key]
            output = [row["output_error"] for row in group if row["output_error"] is not None]
            relative = [row["weight_error"] for row in group]
            found.append({
                "by": by, "key": key, "linears": len(group), "output_error_max": max(output, default=None),
                "output_error_mean": fmean(output) if output else None, "weight_error_relative_max": max(relative),
                "weight_error_relative_mean": fmean(relative),
                "weight_error_max": max(row["weight_error_max"] for row in group),
                "weight_error_mean": fmean(row["weight_error_mean"] for row in group),
                **{level: sum(row.get("level") == level for row in group) for level in _LEVELS},
                "worst": max(group, key=lambda row: row["output_error"] or 0.0)["name"],
            })  # fmt: skip
    return found


def _kind(place: Any) -> Any:
    # A layer's number, or a module's name; experts are one kind.
    return _EXPERT.sub("experts.*.", place) if isinstance(place, str) else place


def changes(rows: Sequence[Row], judged: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """The relative change of each linear's error against the table; empty if no linear has that error.

    Equal checkpoints on equal samples differ only by rounding. rows: from the table. judged: measured on the checkpoint.
    key: `output_error`, which is missing for linears that no token reached, or `weight_error`.
    """
    before = {row["name"]: row for row in rows}
    found = {}
    for row in judged:
        then, now = before[row["name"]][key], row[key]
        if then is not None and now is not None:
            found[str(row["name"])] = abs(now - then) / then if then else float(now != 0)
    return found


def rounding_ratio(rows: Sequence[Row]) -> float | None:
    """The mean over linears of the error on held back samples over that of rounding to nearest; None if not measured."""
    found = [
        row["held_error"] / row["rounding_error"] for row in rows if row.get("held_error") and row["rounding_error"]
    ]
    return fmean(found) if found else None


def outlier(rows: Sequence[Row], judged: Sequence[Mapping[str, Any]]) -> tuple[str, float] | None:
    """The linear whose output error is the largest multiple of its peers' median, and that multiple.

    Peers have the same kind and bits, since errors differ between kinds. Kinds with fewer than `_PEERS` are left out.
    """
    groups: dict[tuple[Any, Any], dict[str, float]] = {}
    errors = {row["name"]: row["output_error"] for row in judged}
    for row in rows:
        if errors.get(row["name"]) is not None:
            groups.setdefault((_kind(row["module"]), row.get("bits")), {})[row["name"]] = errors[row["name"]]
    found = []
    for group in groups.values():
        middle = median(group.values())
        if len(group) >= _PEERS and middle > 0:
            found += [(name, error / middle) for name, error in group.items()]
    return max(found, key=lambda pair: pair[1], default=None)


def shares(
    windows: Windows,
    *,
    places: Sequence[Mapping[str, Any]],
    logprobs: NDArray[np.float32],
    kl: NDArray[np.float32],
    floats: NDArray[np.float64],
    rows: Sequence[Mapping[str, Any]],
    how: BootstrapConfig,
) -> list[Row]:
    """The drop of the loss for each linear that was restored to float, see `RESTORED_COLUMNS`.

    nll_difference_restored is in nats per token against the float model. recovered_nll is the drop of the loss, with its
    interval over documents. Shares are of the variant's whole loss, and None if it lost nothing.

    Args:
        windows: the windows that were scored again.
        places: the worker's rows, `name`, `tensor` and `note`.
        logprobs, kl: float32 (1 + restored linears, tokens), the first row for the variant as it is.
        floats: the float model's loss, float64 (documents,).
        rows: the judged linears' errors, with `layer` and `module`.
        how: number and seed of the resamples, and the intervals' level.
    """
    known = {row["name"]: row for row in rows}
    (own, tokens), before = document_sums(windows, -logprobs[0]), document_sums(windows, kl[0])[0]
    lost, diverged = math.fsum(own - floats), math.fsum(before)
    found = []
    for place in places:
        linear = known[place["name"]]
        row: Row = dict.fromkeys(RESTORED_COLUMNS)
        row.update(
            name=linear["name"], layer=linear["layer"], module=linear["module"], output_error=linear["output_error"]
        )
        row["note"] = place["note"]
        found.append(row)
        if place["tensor"] is None:
            continue
        nll, after = (document_sums(windows, scores[place["tensor"]])[0] for scores in (-logprobs, kl))
        back = paired_bootstrap(own, nll, tokens, how)
        row.update(
            nll_difference_restored=math.fsum(nll - floats) / math.fsum(tokens), recovered_nll=back.estimate,
            recovered_low=back.low, recovered_high=back.high, kl_restored=math.fsum(after) / math.fsum(tokens),
            recovered_share=math.fsum(own - nll) / lost if lost > 0 else None,
            recovered_kl_share=1 - math.fsum(after) / diverged if diverged > 0 else None,
        )  # fmt: skip
    return found


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as CSV; numbers have six digits, since later digits differ between machines."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()})
