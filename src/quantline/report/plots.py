"""The report's plots: each function turns evidence into a `Plot`, or returns None if there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from quantline.core.text import listed
from quantline.report import svg
from quantline.report.evidence import Evidence, Row
from quantline.report.svg import Plot, ink
from quantline.report.table import Table
from quantline.report.units import written


def order_of(evidence: Sequence[Evidence]) -> dict[str, int]:
    """The place of each variant in the order of colours; the float model has 0."""
    others = [item.name for item in evidence if not item.is_baseline]
    return {item.name: 0 for item in evidence if item.is_baseline} | {name: at for at, name in enumerate(others, 1)}


def pareto(rows: Sequence[Row], size: str = "size_bytes", loss: str = "difference_percent") -> list[str]:
    """The variants that no other variant beats in both size and loss, the smallest first."""
    known = [
        row for row in rows if row.get(size) is not None and row.get(loss) is not None and math.isfinite(row[loss])
    ]
    front: list[str] = []
    least = math.inf
    for row in sorted(known, key=lambda row: (row[size], row[loss])):
        if row[loss] < least:
            front.append(str(row["variant"]))
            least = row[loss]
    return front


def quality_size(rows: Sequence[Row], order: Mapping[str, int], limit: float | None, chosen: str | None) -> Plot | None:
    """Growth of the perplexity against the weights' size, with intervals, the Pareto front and the limit."""
    known = [dict(row, difference_percent=0.0) if row["baseline"] else row for row in rows]
    known = [row for row in known if row.get("size_bytes") and _finite(row.get("difference_percent"))]
    if sum(not row["baseline"] for row in known) < 1:
        return None
    front = pareto(known)
    tips: dict[str, str] = {}
    with svg.canvas(680, 400) as figure:
        axes = figure.add_subplot()
        # The limit is in the picture too: what is written beyond the axes takes their room and is cut off.
        lows, tops = [_end(row, "low") for row in known], [_end(row, "high") for row in known] + [limit or 0.0]
        wide = max(tops) > 20
        if wide:
            axes.set_yscale("symlog", linthresh=1.0, linscale=0.8)
        by_name = {row["variant"]: row for row in known}
        steps = [by_name[name] for name in front]
        axes.step([row["size_bytes"] / 1e6 for row in steps], [row["difference_percent"] for row in steps], where="post",
                  color=ink("muted"), linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)  # fmt: skip
        if limit is not None:
            line = axes.axhline(limit, color=ink("bad"), linewidth=1.1, zorder=1)
            svg.gid(line, tips, f"limit: {limit:g} %")
            axes.annotate(f"limit {limit:g} %", (1, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", ha="right", color=ink("bad"), fontsize=8.5)  # fmt: skip
        for row in known:
            _point(axes, row, order, tips, chosen=chosen, on_front=row["variant"] in front)
        sizes = [row["size_bytes"] / 1e6 for row in known]
        if max(sizes) > 8 * min(sizes):
            axes.set_xscale("log")
            axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.4)
        else:
            axes.set_xlim(0, max(sizes) * 1.13)
        _room_around(axes, lows, tops, wide)
        if wide:
            _plain_ticks(axes, min(lows), max(tops))
        axes.set_xlabel("weights on disk, MB (left is smaller)")
        axes.set_ylabel("growth of the perplexity, %" + (" (logarithmic above 1)" if wide else ""))
        _name_points(figure, axes, known, chosen, steps)
        about = "; ".join(f"{row['variant']} {row['size_bytes'] / 1e6:.3g} MB, {row['difference_percent']:+.2f} %"
                          for row in known)  # fmt: skip
        return svg.finish(
            figure, "quality-size", title="Quality against size", description=f"Down and left is better. {about}.",
            caption="Down and left is better. Bars are the interval of each difference; filled points lie on the Pareto "
            f"front (dashed): no variant is both smaller and better. On it: {listed(front)}.", tips=tips,
        )  # fmt: skip


def _point(
    axes: Any, row: Row, order: Mapping[str, int], tips: dict[str, str], *, chosen: str | None, on_front: bool
) -> None:
    place = order[row["variant"]]
    colour, x, y = svg.colour(place), row["size_bytes"] / 1e6, row["difference_percent"]
    low, high = row.get("difference_low_percent"), row.get("difference_high_percent")
    if low is not None and high is not None and not row["baseline"]:
        axes.vlines(x, low, high, color=colour, linewidth=2.2, zorder=2)
    if row["variant"] == chosen:
        axes.plot([x], [y], marker="o", markersize=17, color="none", markeredgecolor=ink("good"), markeredgewidth=1.8)
    (point,) = axes.plot([x], [y], marker=svg.marker(place), markersize=8, color=colour if on_front else ink("bg"),
                         markeredgecolor=colour, markeredgewidth=1.6, linestyle="none", zorder=3)  # fmt: skip
    svg.gid(point, tips, f"{row['variant']}: {x:.3g} MB, {y:+.3g} %")


def _name_points(figure: Any, axes: Any, rows: Sequence[Row], chosen: str | None, steps: Sequence[Row]) -> None:
    """Write each variant's name beside its point, at the first of several positions where it overlaps nothing."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    dots = axes.transData.transform([(row["size_bytes"] / 1e6, row["difference_percent"]) for row in rows])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in dots]
    corners = axes.transData.transform([(row["size_bytes"] / 1e6, row["difference_percent"]) for row in steps])
    for (x, y), (right, below) in pairwise(corners):
        taken += [Bbox.from_extents(x, y - 1, right, y + 1), Bbox.from_extents(right - 1, below, right + 1, y)]
    for row in rows:
        x = row["size_bytes"] / 1e6
        (left, low), (_, high) = axes.transData.transform([(x, _end(row, "low")), (x, _end(row, "high"))])
        taken.append(Bbox.from_extents(left - 1, low, left + 1, high))
    frame = axes.get_window_extent()
    places = [(12, -3, "left"), (-12, -3, "right"), (0, 12, "center"), (0, -19, "center"), (10, 12, "left"),
              (-10, 12, "right"), (10, -19, "left"), (-10, -19, "right"), (0, 26, "center"), (0, -33, "center")]  # fmt: skip
    for row in rows:
        best = None
        for dx, dy, side in places:
            label = axes.annotate(
                svg.short(row["variant"]), (row["size_bytes"] / 1e6, row["difference_percent"]), xytext=(dx, dy),
                textcoords="offset points", ha=side, fontsize=8.8, weight="bold" if row["variant"] == chosen else "normal",
            )  # fmt: skip
            box = label.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            faults = sum(box.overlaps(other) for other in taken) + 3 * (not inside)
            if best is None or faults < best[0]:
                if best is not None:
                    best[1].remove()
                best = faults, label, box
            else:
                label.remove()
            if faults == 0:
                break
        assert best is not None
        taken.append(best[2])


def _end(row: Row, end: str) -> float:
    value = row.get(f"difference_{end}_percent")
    return float(row["difference_percent"] if value is None else value)


def _room_around(axes: Any, lows: Sequence[float], tops: Sequence[float], wide: bool) -> None:
    """Room for the points' names: above the highest, and below the lowest, which can be below zero."""
    top, bottom = max([*tops, 0.5]), min([*lows, 0.0])
    if wide:
        axes.set_ylim(min(-0.3, 2 * bottom), top * 2.2)
    else:
        axes.set_ylim(bottom - 0.1 * (top - bottom), top + 0.15 * (top - bottom))


def _plain_ticks(axes: Any, bottom: float, top: float) -> None:
    steps = (0.5, 1, 3, 10, 30, 100, 300, 1000, 10_000, 100_000, 1_000_000)
    ticks = [-step for step in reversed(steps) if -step >= 2 * bottom]
    ticks += [0, *(step for step in steps if step <= 2 * top)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def forest(rows: Sequence[Row], order: Mapping[str, int]) -> Plot | None:
    """Distances from float with intervals, one panel per measure; an interval without zero is a real difference."""
    wanted = (
        ("difference_percent", "difference_low_percent", "difference_high_percent", "growth of the perplexity, %", 1.0),
        ("kl_divergence", "kl_divergence_low", "kl_divergence_high", "KL from float, nats/token", 1.0),
        ("top1_agreement", "top1_agreement_low", "top1_agreement_high", "same likeliest token, %", 100.0),
    )
    kept = [row for row in rows if order.get(row["variant"])]
    panels = [panel for panel in wanted if any(_finite(row.get(panel[0])) for row in kept)]
    if not panels or not kept:
        return None
    tips: dict[str, str] = {}
    with svg.canvas(max(440, 300 * len(panels) + 110), 92 + 26 * len(kept)) as figure:
        for at, (key, low, high, label, factor) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), at + 1)
            for y, row in enumerate(kept):
                if not _finite(row.get(key)):
                    axes.annotate("not measured", (0.5, y), xycoords=("axes fraction", "data"), ha="center", va="center",
                                  color=ink("muted"), fontsize=8.5)  # fmt: skip
                    continue
                place = order[row["variant"]]
                if row.get(low) is not None and row.get(high) is not None:
                    axes.hlines(y, factor * row[low], factor * row[high], color=svg.colour(place), linewidth=2.6)
                (dot,) = axes.plot([factor * row[key]], [y], marker=svg.marker(place), color=svg.colour(place),
                                   markersize=6.5)  # fmt: skip
                svg.gid(dot, tips, f"{row['variant']}, {label}: {factor * row[key]:.4g}")
            largest = max(abs(factor * row[key]) for row in kept if _finite(row.get(key)))
            if key == "difference_percent":
                if largest > 20:
                    axes.set_xscale("symlog", linthresh=1.0)
                    ticks = [tick for tick in (0, 1, 10, 100, 1000, 100_000) if tick <= 3 * largest]
                    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                    axes.minorticks_off()
                axes.axvline(0, color=ink("muted"), linewidth=1.2)
            elif key == "kl_divergence":
                _positive(axes, [row[key] for row in kept if _finite(row.get(key))])
            axes.set_ylim(len(kept) - 0.5, -0.5)
            axes.set_yticks(
                range(len(kept)), [svg.short(row["variant"]) for row in kept] if at == 0 else [""] * len(kept)
            )
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
            axes.set_title(label)
        about = "; ".join(f"{row['variant']} {row['difference_percent']:+.3f} %" for row in kept
                          if _finite(row.get("difference_percent")))  # fmt: skip
        return svg.finish(
            figure, "distances", title="Distances from the float model, with intervals", description=f"{about}.",
            caption="Points with the interval of each. A difference is real, at the stated level, if its interval does not "
            "contain zero; two variants with overlapping intervals cannot be told apart.", tips=tips,
        )  # fmt: skip


def _positive(axes: Any, values: Sequence[float]) -> None:
    """A scale for divergences: from zero, or logarithmic if they differ by orders of magnitude."""
    above = [value for value in values if value > 0]
    if len(above) == len(values) and max(above) > 30 * min(above):
        axes.set_xscale("log")
        axes.set_xlim(min(above) / 2, max(above) * 2)
        axes.xaxis.set_minor_formatter("")
        ticks = [10.0**power for power in range(-8, 3) if min(above) / 2 <= 10.0**power <= max(above) * 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.set_xlim(left=0)


def memory(table: Table, order: Mapping[str, int]) -> Plot | None:
    """Bars of memory, one panel per kind, each with its own scale."""
    wanted = (("size_bytes", "weights on disk"), ("weights_memory_bytes", "weights in vLLM"),
              ("quantize_peak_bytes", "peak of quantizing"))  # fmt: skip
    rows = table.rows
    panels = [panel for panel in wanted if any(row.get(panel[0]) for row in rows)]
    if not panels:
        return None
    tips: dict[str, str] = {}
    with svg.canvas(max(440, 290 * len(panels) + 110), 84 + 28 * len(rows)) as figure:
        for at, (key, label) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), at + 1)
            top = max(row.get(key) or 0 for row in rows)
            for y, row in enumerate(rows):
                value = row.get(key)
                if value is None:
                    none = (
                        "makes none" if key == "quantize_peak_bytes" and order[row["variant"]] == 0 else "not measured"
                    )
                    axes.text(0.02 * top, y, none, va="center", color=ink("muted"), fontsize=8.5)
                    continue
                (bar,) = axes.barh(y, value, height=0.62, color=svg.colour(order[row["variant"]]))
                svg.gid(bar, tips, f"{row['variant']}, {label}: {written(value, 'bytes')}")
                at_end, side, colour = (-0.02, "right", "bg") if value > 0.6 * top else (0.02, "left", "fg")
                axes.text(value + at_end * top, y, written(value, "bytes"), va="center", ha=side, color=ink(colour),
                          fontsize=8.5)  # fmt: skip
            axes.set_xlim(0, top * 1.02)
            axes.set_xticks([])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(
                range(len(rows)), [svg.short(row["variant"]) for row in rows] if at == 0 else [""] * len(rows)
            )
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
            axes.set_title(label)
        about = "; ".join(
            f"{row['variant']}: " + ", ".join(f"{label} {written(row.get(key), 'bytes')}" for key, label in panels)
            for row in rows
        )  # fmt: skip
        return svg.finish(
            figure, "memory", title="Memory", description=f"{about}.", tips=tips,
            caption="Each panel has its own scale: quantizing a variant takes far more memory than storing it.",
        )  # fmt: skip


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
