"""How variants were chosen: the loss of each unit of linears by width, with the width that the variant gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from quantline.checkpoints.linears import place_of
from quantline.planning.allocation import FLOAT_BITS
from quantline.planning.budget import patterns
from quantline.report import svg
from quantline.report.evidence import Evidence, Row
from quantline.report.layer_plots import RAMP
from quantline.report.svg import Plot, ink
from quantline.report.table import Table, variant_column
from quantline.report.units import Column

# If every unit lost as much as a pale one, the perplexity would grow by less than the first; of dark ones by more than the
# second. Both are logarithms of the growth, in nats.
_PALE, _DARK = 0.01, 0.1
# Up to this many cells, each shows its number.
_WRITTEN = 400
# The widest drawing of all layers; cells get narrower.
_CELLS_WIDE = 980


def losses(evidence: Sequence[Evidence]) -> Table:
    """The loss of each unit at each width, and whether the variant gave it that width."""
    rows = [row for item in evidence for row in _rows(item)]
    columns = (
        variant_column(), Column("unit", "linears", "code"), Column("bits", "bits", "plain"),
        Column("kl", "loss, nats a token", "nats"), Column("chosen", "chosen", "yes"),
    )  # fmt: skip
    return Table(
        "unit_losses", "What rounding one unit of linears alone costs, by width.", columns, rows, optional=True
    )


def _rows(item: Evidence) -> list[Row]:
    units = item.chosen.get("units") or []
    widths = _widths([str(row["unit"]) for row in units], item.record.config)
    found: list[Row] = [
        {"variant": item.name, **row, "chosen": widths[str(row["unit"])] == row["bits"]} for row in units
    ]
    return found + [
        {"variant": item.name, "unit": unit, "bits": FLOAT_BITS, "kl": 0.0, "chosen": True}
        for unit, bits in widths.items() if bits == FLOAT_BITS
    ]  # fmt: skip


def _widths(units: Sequence[str], config: Mapping[str, Any]) -> dict[str, int]:
    """The width that a variant gives each unit. All linears of a unit have the same, so its first one is asked for."""
    rules = (config.get("layers") or {}).get("rules") or []
    found = {}
    for unit in units:
        name = patterns(unit)[0]
        rule: Mapping[str, Any] = next((one for one in rules if fnmatchcase(name, one["match"])), {})
        found[unit] = FLOAT_BITS if rule.get("skip") else int(rule.get("bits") or config["bits"])
    return found


def heat_maps(evidence: Sequence[Evidence]) -> list[Plot]:
    """One plot for each variant that was chosen: units with their widths by decoder layers, all on one scale."""
    return [_heat_map(item.name, rows) for item in evidence if (rows := _rows(item))]


def _heat_map(name: str, rows: Sequence[Row]) -> Plot:
    from matplotlib.colors import LinearSegmentedColormap

    placed = [(*place_of(str(row["unit"])), row) for row in rows]
    layers = sorted({layer for layer, *_ in placed})
    kinds = list(dict.fromkeys(kind for _, kind, _ in placed))
    lines = [(kind, bits) for kind in kinds for bits in sorted({row["bits"] for _, own, row in placed if own == kind})]
    cells = np.full((len(lines), len(layers)), np.nan)
    marks = []
    for layer, kind, row in placed:
        place = lines.index((kind, row["bits"])), layers.index(layer)
        cells[place] = row["kl"]
        marks += [place] if row["chosen"] else []
    shade = _shade(len({str(row["unit"]) for row in rows}))
    written = cells.size <= _WRITTEN
    wide = min(52.0, _CELLS_WIDE / len(layers))
    with svg.canvas(max(460, 250 + wide * len(layers)), 84 + 19 * len(lines)) as figure:
        axes = figure.add_subplot()
        axes.pcolormesh(
            np.arange(len(layers) + 1) - 0.5, np.arange(len(lines) + 1) - 0.5, np.ma.masked_invalid(shade(cells)),
            cmap=LinearSegmentedColormap.from_list("losses", RAMP), vmin=0, vmax=1, edgecolors=ink("bg"),
            linewidth=1.2 if written else 0.4,
        )  # fmt: skip
        for (y, x), value in np.ndenumerate(cells):
            if written and not math.isnan(value):
                axes.text(x, y, _short(value), ha="center", va="center", fontsize=7.4,
                          color="#fffefb" if shade(value) > 0.5 else "#241a12")  # fmt: skip
        _mark(axes, marks)
        for y, (one, _) in enumerate(lines):
            if y and one != lines[y - 1][0]:
                axes.axhline(y - 0.5, color=ink("bg"), linewidth=4)
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        every = max(1, len(layers) // 24)
        axes.set_xticks(range(0, len(layers), every), ["-" if layer < 0 else str(layer) for layer in layers[::every]])
        axes.set_yticks(range(len(lines)), [_label(lines, y) for y in range(len(lines))])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("decoder layer")
        axes.set_title(svg.short(name))
        chosen = sum(row["kl"] for row in rows if row["chosen"])
        worst = max(rows, key=lambda row: row["kl"])
        return svg.finish(
            figure, f"losses-{name}", title=f"Loss of each unit by width, {name}",
            description=f"The sum of the chosen ones is {chosen:.3g} nats a token. Largest of all: {worst['unit']} at "
            f"{worst['bits']} bits, {worst['kl']:.3g}.",
            caption=f"{name}: the sum of the chosen ones (framed) is {chosen:.3g} nats a token. Pale: if all units lost as "
            "much, the perplexity would grow by less than 1 %; dark: by more than 10 %.",
        )  # fmt: skip


def _shade(units: int) -> Any:
    """From a loss in nats to its place on the ramp, 0 to 1, by its logarithm; units: how many share the whole loss."""
    losses = np.log([_PALE / units / 10, _PALE / units, _DARK / units, 10 * _DARK / units])
    return lambda loss: np.interp(np.log(np.maximum(loss, 1e-300)), losses, (0.0, 0.2, 0.8, 1.0))


def _mark(axes: Any, places: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    for y, x in places:
        axes.add_patch(
            Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, fill=False, edgecolor=ink("c1"), linewidth=2.2, zorder=4)
        )


def _label(lines: Sequence[tuple[str, int]], y: int) -> str:
    kind, bits = lines[y]
    width = "float" if bits == FLOAT_BITS else f"{bits} bits"
    return width if y and lines[y - 1][0] == kind else f"{kind}   {width}"


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-") if value < 0.001 else f"{value:.2g}"
