"""A picture of what a stage used while it ran: processor, memory, and each GPU's memory, use and power."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Ending of a column -> what its panel is called, and what its values are divided by.
_PANELS = (
    ("cpu_percent", "processor, % of a core", 1.0),
    ("rss_bytes", "processes' memory, GB", 1e9),
    ("system_memory_used_bytes", "machine's memory, GB", 1e9),
    ("gpu_memory_used_bytes", "GPU memory, GB", 1e9),
    ("gpu_utilisation_percent", "GPU busy, %", 1.0),
    ("gpu_power_watts", "GPU power, W", 1.0),
)


def draw(series: Mapping[str, Any], path: Path, title: str) -> bool:
    """Write the series of a result's `monitor` as PNG; False, and no file, where it has no samples.

    Equal series give equal bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not series.get("samples"):
        return False
    columns: list[str] = list(series["columns"])
    values = np.array(series["samples"], dtype=np.float64)  # (rows, columns); what a board does not tell is NaN
    panels = [(label, scale, found) for name, label, scale in _PANELS if (found := _columns_of(columns, name))]
    figure = Figure(figsize=(7.0, 0.6 + 1.3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (label, scale, found) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        for column in found:
            axes.plot(values[:, 0], values[:, column] / scale, linewidth=1.2, label=columns[column].partition("_")[0])
        axes.set_title(label, fontsize=8, loc="left")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        if len(found) > 1:
            axes.legend(fontsize=6)
    axes.set_xlabel("seconds", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return True


def _columns_of(columns: list[str], name: str) -> list[int]:
    """The columns of a quantity; those of GPUs have the GPU's number in their name."""
    if not name.startswith("gpu_"):
        return [columns.index(name)] if name in columns else []
    ending = name.removeprefix("gpu")
    return [at for at, column in enumerate(columns) if column.startswith("gpu") and column.endswith(ending)]
