"""How variants were chosen: the search that found them, and the loss of each unit of linears by width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.linears import place_of
from quantline.core.files import write_json
from quantline.planning.allocation import FLOAT_BITS
from quantline.planning.budget import patterns
from quantline.report import svg
from quantline.report.evidence import Evidence, Row
from quantline.report.layer_plots import RAMP
from quantline.report.svg import Plot, ink
from quantline.report.table import Table, as_csv, variant_column
from quantline.report.units import Column

# If every unit lost as much as a pale one, the perplexity would grow by less than the first; of dark ones by more than the
# second. Both are logarithms of the growth, in nats.
_PALE, _DARK = 0.01, 0.1
# Up to this many cells, each shows its number.
_WRITTEN = 400
# The widest drawing of all layers; cells get narrower.
_CELLS_WIDE = 980


def searches(evidence: Sequence[Evidence]) -> Table:
    """One row for each variant that a search found: the goal and what it took."""
    rows = [
        {"variant": item.name, "candidates": len(found["candidates"]),
         **{key: found[key] for key in ("goal", "answer", "measured", "command")}}
        for item, found in _searched(evidence)
    ]  # fmt: skip
    columns = (
        variant_column(), Column("goal", "goal"), Column("answer", "answer", "code"),
        Column("measured", "measured", "count"), Column("candidates", "candidates", "count"),
        Column("command", "command", "code"),
    )  # fmt: skip
    return Table("searches", "What was searched for.", columns, rows, optional=True)


def measured(evidence: Sequence[Evidence]) -> Table:
    """The candidates that a search measured."""
    rows = [
        {"variant": item.name, "candidate": row["name"], **{key: value for key, value in row.items() if key != "name"}}
        for item, found in _searched(evidence) for row in found["candidates"] if row["documents"] is not None
    ]  # fmt: skip
    columns = (
        Column("candidate", "candidate", "code"), Column("state", "became"), Column("front", "on the front", "yes"),
        Column("size_bytes", "weights on disk", "bytes"),
        Column("change_percent", "perplexity growth", "growth", "low", "high"), Column("kl", "KL", "nats"),
        Column("speed_up", "speed-up", "ratio", missing="-"), Column("documents", "documents", "count"),
        Column("why", "why"), variant_column(),
    )  # fmt: skip
    return Table("search_measured", "What the search measured.", columns, rows, optional=True)


def untried(evidence: Sequence[Evidence]) -> Table:
    """The candidates without figures, and why."""
    rows = [
        {"variant": item.name, "candidate": row["name"], **{key: row[key] for key in ("state", "why", "size_bytes")}}
        for item, found in _searched(evidence) for row in found["candidates"] if row["documents"] is None
    ]  # fmt: skip
    columns = (
        Column("candidate", "candidate", "code"), Column("state", "became"), Column("why", "why"),
        Column("size_bytes", "weights on disk", "bytes", missing="-"), variant_column(),
    )  # fmt: skip
    return Table("search_untried", "What was not tried, and why.", columns, rows, optional=True)


def _searched(evidence: Sequence[Evidence]) -> list[tuple[Evidence, Row]]:
    return [(item, item.chosen["search"]) for item in evidence if item.chosen.get("search")]


def fronts(evidence: Sequence[Evidence]) -> list[Plot]:
    """One plot for each variant that a search found."""
    return [plot for item, found in _searched(evidence) if (plot := front(found, item.name))]


def front(search: Mapping[str, Any], name: str) -> Plot | None:
    """Growth of the perplexity against size of the candidates that a search measured, with intervals, limits and front.

    Args:
        search: of `planning.search_record`.
        name: ends the plot's name.
    """
    rows = [row for row in search["candidates"] if row["change_percent"] is not None]
    if not rows:
        return None
    tips: dict[str, str] = {}
    with svg.canvas(680, 380) as figure:
        axes = figure.add_subplot()
        ends = [row[key] for row in rows for key in ("change_percent", "low", "high")]
        if max(ends) > 20:
            axes.set_yscale("symlog", linthresh=1.0, linscale=0.8)
        steps = sorted((row for row in rows if row["front"]), key=lambda row: row["size_bytes"])
        axes.step([row["size_bytes"] / 1e6 for row in steps], [row["change_percent"] for row in steps], where="post",
                  color=ink("muted"), linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)  # fmt: skip
        limits = (axes.axhline, search["loss_at_most"], 100.0, "%"), (axes.axvline, search["size_at_most"], 1e-6, "MB")
        for draw, limit, unit, word in limits:
            if limit is not None:
                svg.gid(
                    draw(limit * unit, color=ink("bad"), linewidth=1.1, zorder=1),
                    tips,
                    f"limit: {limit * unit:.4g} {word}",
                )
        for row in rows:
            _candidate(axes, row, tips)
        axes.margins(x=0.16, y=0.14)
        axes.set_xlabel("weights on disk, MB (left is smaller)")
        axes.set_ylabel("growth of the perplexity, %" + (" (logarithmic above 1)" if max(ends) > 20 else ""))
        about = "; ".join(
            f"{row['name']} {row['size_bytes'] / 1e6:.3g} MB {row['change_percent']:+.2f} %" for row in rows
        )
        answer = f"The answer is {search['answer']} (ring)." if search["answer"] else "Nothing meets it."
        return svg.finish(
            figure, f"front-{name}", title=f"What the search measured, {name}", description=f"{about}. {answer}",
            caption=f"Goal: {search['goal']}. {answer} Bars are intervals. Hollow points were decided on a part of the "
            "documents. The front is dashed, limits are red.", tips=tips,
        )  # fmt: skip


def write_search(search: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write a search into a folder: record.json, tables as CSV, and the picture of its front; returns the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "record.json", search)
    rows = search["candidates"]
    texts = {
        "candidates.csv": rows,
        "front.csv": sorted((row for row in rows if row["front"]), key=lambda row: row["size_bytes"]),
    }
    for name, found in texts.items():
        columns = tuple(Column(key, key) for key in (rows[0] if rows else {}))
        (folder / name).write_text(as_csv(Table(name, "", columns, list(found))), encoding="utf-8")
    picture = front(search, "search")
    if picture is not None:
        (folder / "front.svg").write_text(picture.file, encoding="utf-8")
    return {name: folder / name for name in ("record.json", *texts, *(["front.svg"] if picture else []))}


def _candidate(axes: Any, row: Row, tips: dict[str, str]) -> None:
    won, colour = row["state"] == "winner", ink("good" if row["state"] == "winner" else "c1")
    x, y = row["size_bytes"] / 1e6, row["change_percent"]
    axes.vlines(x, row["low"], row["high"], color=colour, linewidth=2, zorder=2)
    if won:
        axes.plot([x], [y], marker="o", markersize=16, color="none", markeredgecolor=colour, markeredgewidth=1.8)
    whole = row["state"] in ("winner", "finalist")
    (point,) = axes.plot([x], [y], marker="o", markersize=7, color=colour if whole else ink("bg"), markeredgecolor=colour,
                         markeredgewidth=1.6, linestyle="none", zorder=3)  # fmt: skip
    svg.gid(
        point, tips, f"{row['name']}: {x:.3g} MB, {y:+.3g} % [{row['low']:+.3g}, {row['high']:+.3g}], {row['state']}"
    )
    axes.annotate(row["name"], (x, y), xytext=(9, 3), textcoords="offset points", fontsize=8.6,
                  weight="bold" if won else "normal")  # fmt: skip


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
