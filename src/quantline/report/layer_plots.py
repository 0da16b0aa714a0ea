"""Plots of the linears: heat maps of their errors, and the effect of putting single linears back to float."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from quantline.quantization.heat_map import grid
from quantline.report import svg
from quantline.report.evidence import Evidence, Row
from quantline.report.svg import Plot, ink

# Up to this many cells, each shows its number.
_WRITTEN = 260
RAMP = ("#f4f1e8", "#f0d9a8", "#e9a860", "#d4673c", "#a32a3a", "#5c1040")


def heat_maps(evidence: Sequence[Evidence]) -> list[Plot]:
    """One heat map per variant, kinds of linears by decoder layers, all on one scale."""
    found = [(item, *grid(item.layers)) for item in evidence if item.layers]
    values = [value for *_, cells in found for value in cells.ravel() if math.isfinite(value) and value > 0]
    if not values:
        return []
    levels: Row = next((known for item, *_ in found if (known := _levels(item))), {})
    shade = _shades(max(min(values), max(values) / 1e4), max(values), levels)
    return [plot for item, layers, kinds, cells in found if (plot := _heat_map(item, layers, kinds, cells, shade))]


def _levels(item: Evidence) -> Row:
    return dict((item.record.config.get("layer_errors") or {}).get("levels") or {})


def _shades(least: float, most: float, levels: Mapping[str, float]) -> Callable[[Any], Any]:
    """From an error to its place on the ramp, 0 to 1, by its logarithm. Errors below the level `moderate` are pale, those
    of the level `high` dark, whatever the others are.
    """
    places = [(least, 0.0), (most, 1.0)]
    if levels:
        moderate, high = levels["moderate"], levels["high"]
        places = [(min(least, moderate / 100), 0.0), (moderate, 0.24), (high, 0.56), (max(most, 4 * high), 1.0)]
    errors, shades = zip(*places, strict=True)
    return lambda error: np.interp(np.log(np.maximum(error, errors[0])), np.log(errors), shades)


def _heat_map(
    item: Evidence, layers: list[int], kinds: list[str], cells: np.ndarray, shade: Callable[[Any], Any]
) -> Plot | None:
    from matplotlib.colors import LinearSegmentedColormap

    cells = np.where(np.isfinite(cells), cells, np.nan)
    if np.isnan(cells).all():
        return None
    levels = _levels(item)
    ramp = LinearSegmentedColormap.from_list("errors", RAMP)
    width = 190 + 52 * min(len(layers), 12) + 22 * max(0, len(layers) - 12)
    with svg.canvas(max(430, width), 84 + 25 * len(kinds)) as figure:
        axes = figure.add_subplot()
        written = cells.size <= _WRITTEN
        axes.pcolormesh(
            np.arange(len(layers) + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5,
            np.ma.masked_invalid(shade(cells)),
            cmap=ramp, vmin=0, vmax=1, edgecolors=ink("bg"), linewidth=1.5 if written else 0.4,
        )  # fmt: skip
        for (y, x), value in np.ndenumerate(cells):
            if math.isnan(value) or not written:
                continue
            mark = {"high": "▲", "moderate": "△"}.get(_level(value, levels), "")
            dark = shade(value) > 0.5
            axes.text(x, y, f"{value:.2g}{mark}", ha="center", va="center", fontsize=7.8,
                      color="#fffefb" if dark else "#241a12")  # fmt: skip
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        every = max(1, len(layers) // 24)
        axes.set_xticks(range(0, len(layers), every), ["-" if layer < 0 else str(layer) for layer in layers[::every]])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("decoder layer")
        axes.set_title(svg.short(item.name))
        worst = max(item.layers, key=lambda row: row.get("output_error") or 0.0)
        counts = {name: sum(_level(value, levels) == name for value in cells.ravel() if not math.isnan(value))
                  for name in ("low", "moderate", "high")}  # fmt: skip
        shares = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        limits = f" Moderate (△) from {levels['moderate']:g}, high (▲) from {levels['high']:g}." if levels else ""
        return svg.finish(
            figure, f"errors-{item.name}", title=f"Output error by layer and kind of linear, {item.name}",
            description=f"Largest: {worst['name']} {worst.get('output_error')}. {shares}.",
            caption=f"{item.name}: {shares or 'no level'}; the largest is {worst['name']}.{limits}",
        )  # fmt: skip


def _level(value: float, levels: Mapping[str, float]) -> str:
    if not levels:
        return ""
    return "high" if value >= levels["high"] else "moderate" if value >= levels["moderate"] else "low"


def restored(rows: Sequence[Row], order: Mapping[str, int]) -> Plot | None:
    """Bars of how much of a variant's loss is undone by putting one linear back to float."""
    kept = [row for row in rows if row.get("recovered_share") is not None and math.isfinite(row["recovered_share"])]
    if not kept:
        return None
    tips: dict[str, str] = {}
    with svg.canvas(680, 74 + 22 * len(kept)) as figure:
        axes = figure.add_subplot()
        for y, row in enumerate(kept):
            share = 100 * row["recovered_share"]
            (bar,) = axes.barh(y, share, height=0.66, color=svg.colour(order.get(row["variant"], 0)))
            svg.gid(bar, tips, f"{row['variant']}, {row['name']}: {share:.3g} %")
            axes.annotate(f"{share:.1f} %", (share, y), xytext=(4 if share >= 0 else -4, 0), textcoords="offset points",
                          ha="left" if share >= 0 else "right", va="center", fontsize=8.2)  # fmt: skip
        axes.axvline(0, color=ink("muted"), linewidth=1)
        axes.margins(x=0.14)
        axes.set_ylim(len(kept) - 0.5, -0.5)
        axes.set_yticks(range(len(kept)), [f"{svg.short(row['variant'])}  {_short(row['name'])}" for row in kept])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of the loss undone, %")
        return svg.finish(
            figure, "restored", title="What one linear in float undoes", tips=tips,
            description="; ".join(f"{row['variant']} {row['name']} {100 * row['recovered_share']:.1f} %" for row in kept),
            caption="Each of the worst linears was put back to float by itself and the loss measured again. Shares need "
            "not add up to 100 %: errors of different linears can cancel or amplify each other. Those that are not told "
            "from zero are left out.",
        )  # fmt: skip


def _short(name: str) -> str:
    return str(name).removeprefix("model.").replace("layers.", "layer ", 1)
