"""The loss of each unit of linears at each width, measured on calibration tokens by the worker `reference.sensitivity`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.checkpoints.linears import place_of
from quantline.quantization import heat_map
from quantline.serving.checkpoint_facts import units_of
from quantline.toolchains.protocol import JobResult

TABLE = "units.csv"
# Methods that round to an integer grid of any of the widths.
BUDGETED = ("gptq", "rtn", "autoround")
_WORKER = ("reference", "quantline.toolchains.workers.reference.sensitivity")
_COLUMNS = ("unit", "bits", "group_size", "kl")

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Grids:
    """Widths to measure, rounded to nearest: bits, the group size (-1 is one group per row), and the kind of zero points."""

    bits: Sequence[int]
    group_size: int
    symmetric: bool


def measure(
    model: Path, linears: Iterable[str], grids: Grids, calibration: Path, samples: int, *, device: str, threads: int,
    run_worker: RunWorker,
) -> tuple[list[dict[str, Any]], dict[str, float]]:  # fmt: skip
    """Measure each unit at each width.

    Args:
        model: folder of the float model.
        linears: names of the linears that a variant would quantize.
        grids: the widths.
        calibration: tokens.safetensors.
        samples: calibration samples to measure on.
        device, threads: of the worker.
        run_worker: (toolchain, module, job, label) -> its result.

    Returns:
        rows of `unit`, `bits`, `group_size` and `kl` in nats per token, and metrics.

    Raises:
        UserError: a unit's weights cannot be replaced, or its module never runs.
    """
    units = units_of(linears)
    job = {
        "model": str(model), "units": units, "calibration": str(calibration), "samples": samples,
        "grids": [
            {"bits": bits, "group_size": grids.group_size, "symmetric": grids.symmetric} for bits in grids.bits
        ],
        "device": device, "threads": threads,
    }  # fmt: skip
    data = run_worker(*_WORKER, job, "loss of each unit and width").data
    metrics = {"units": len(units), "probes": len(data["rows"]), "tokens": data["tokens"]}
    return [{**row, "kl": float(f"{row['kl']:.6g}")} for row in data["rows"]], metrics


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the rows as CSV."""
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Write a heat map of the losses for each width, units by layers; returns the files' names."""
    found = []
    for bits in sorted({int(row["bits"]) for row in rows}):
        cells = []
        for row in rows:
            if row["bits"] == bits:
                layer, module = place_of(str(row["unit"]))
                cells.append({"layer": layer, "module": module, "kl": row["kl"]})
        name = f"units-w{bits}.png"
        title = f"Divergence by rounding one unit to {bits} bits"
        if heat_map.draw(cells, folder / name, title, key="kl", label="nats per token"):
            found.append(name)
    return found


def read(folder: Path) -> dict[tuple[str, int], float]:
    """The losses in nats per token by unit and bits."""
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        return {(row["unit"], int(row["bits"])): float(row["kl"]) for row in csv.DictReader(file)}
