"""A heat map of the output errors: decoder layers by kinds of linears."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# With at most this many cells, each shows its number.
_WRITTEN = 240


def imports() -> None:
    """Import what `draw` needs; importing takes about as long as drawing."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def grid(
    rows: Sequence[Mapping[str, Any]], key: str = "output_error"
) -> tuple[list[int], list[str], NDArray[np.float64]]:
    """Decoder layers, kinds of linears (experts are one kind), and the largest value of each cell, NaN if it has none.

    Returns:
        layers, kinds in the order of their first appearance, float64 (kinds, layers).
    """
    cells: dict[tuple[str, int], float] = {}
    for row in rows:
        kind = re.sub(r"\bexperts\.\d+\.", "experts.*.", str(row["module"]))
        value = row.get(key)
        if value is not None:
            place = kind, int(row["layer"])
            cells[place] = max(cells.get(place, 0.0), float(value))
    layers = sorted({layer for _, layer in cells})
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    values = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), value in cells.items():
        values[kinds.index(kind), layers.index(layer)] = value
    return layers, kinds, values


def draw(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str, *, key: str = "output_error",
    label: str = "relative output error",
) -> bool:  # fmt: skip
    """Write the heat map of the output errors as PNG; write nothing and return False if there are no errors to show.

    Equal rows give equal bytes. key, label: another column to show, and what it is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, kinds, values = grid(rows, key)
    values = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(values).all():
        return False
    size = (max(5.0, 2.6 + 0.45 * len(layers)), max(2.4, 1.3 + 0.34 * len(kinds)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="YlOrRd", aspect="auto", vmin=0)
    every = max(1, len(layers) // 40)
    axes.set_xticks(range(0, len(layers), every), ["-" if layer < 0 else str(layer) for layer in layers[::every]])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("decoder layer")
    axes.set_title(title, fontsize=9)
    if values.size <= _WRITTEN:
        middle = 0.6 * float(np.nanmax(values))  # darker cells have white numbers
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            value = float(values[row, column])
            colour = "black" if value < middle else "white"
            axes.text(int(column), int(row), f"{value:.2g}", ha="center", va="center", color=colour, fontsize=6)
    figure.colorbar(image, ax=axes, label=label)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return True
