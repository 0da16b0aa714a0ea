"""Plots of speed, tasks, and the monitor's samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantline.report import svg
from quantline.report.evidence import Evidence, Row
from quantline.report.svg import Plot, ink

# Points per series on the page; the results contain all.
_POINTS = 100


def speed(evidence: Sequence[Evidence], order: Mapping[str, int]) -> Plot | None:
    """Throughput, time to first token and time between tokens by requests at once."""
    panels = (
        ("output_tokens_per_second", None, "tokens/s, all requests"),
        ("ttft_ms_median", "ttft_ms_p99", "first token, ms"),
        ("itl_ms_median", "itl_ms_p99", "between tokens, ms"),
    )
    runs = [item for item in evidence if not item.is_baseline and item.speed.get("rows")]
    if not runs:
        return None
    tips: dict[str, str] = {}
    with svg.canvas(920, 330) as figure:
        handles: dict[str, Any] = {}
        for at, (key, tail, label) in enumerate(panels):
            axes = figure.add_subplot(1, 3, at + 1)
            for item in runs:
                for model in ("float", "variant"):
                    rows = sorted((row for row in item.speed["rows"] if row["model"] == model and row.get(key) is not None),
                                  key=lambda row: row["concurrency"])  # fmt: skip
                    if not rows:
                        continue
                    place = 0 if model == "float" else order[item.name]
                    name = "float, same session" if model == "float" else item.name
                    xs, colour = [row["concurrency"] for row in rows], svg.colour(place)
                    wide, above = (1.1, 2) if model == "float" else (1.8, 3)
                    (line,) = axes.plot(xs, [row[key] for row in rows], marker=svg.marker(place), markersize=5.5,
                                        color=colour, linewidth=wide, zorder=above)  # fmt: skip
                    svg.gid(line, tips, f"{name} ({item.name}), {label}: " +
                            ", ".join(f"{row['concurrency']}: {row[key]:.4g}" for row in rows))  # fmt: skip
                    handles.setdefault(svg.short(name), line)
                    if tail and all(row.get(tail) is not None for row in rows):
                        axes.plot(xs, [row[tail] for row in rows], color=colour, linewidth=1, linestyle=(0, (1, 1.6)))
            axes.set_xscale("log", base=2)
            ticks = sorted({row["concurrency"] for item in runs for row in item.speed["rows"]})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("requests at once")
            axes.set_title(label)
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=min(len(handles), 4))
        return svg.finish(
            figure, "speed", title="Throughput and latency by requests at once", tips=tips,
            description=f"{len(runs)} variants, each beside the float model of its own session; numbers are in the table.",
            caption="Grey is the float model, measured in the same session as each variant. Dotted lines are the 99th "
            "percentile. More tokens/s is better, fewer milliseconds are better.",
        )  # fmt: skip


def ratios(evidence: Sequence[Evidence], order: Mapping[str, int]) -> Plot | None:
    """Speed-up over float by concurrency, with intervals; below 1 is slower than float."""
    runs = [item for item in evidence if item.speed.get("ratios")]
    if not runs:
        return None
    tips: dict[str, str] = {}
    steps = sorted({row["concurrency"] for item in runs for row in item.speed["ratios"]})
    with svg.canvas(560, 110 + (len(runs) + 1) * 22 * len(steps)) as figure:
        axes = figure.add_subplot()
        ticks, names, y = [], [], 0
        for step in steps:
            names.append(f"{step} at once")
            ticks.append(y)
            y += 1
            for item in runs:
                for row in item.speed["ratios"]:
                    if row["concurrency"] != step or row.get("speed_up") is None:
                        continue
                    slower, colour = bool(row.get("slower_than_float")), svg.colour(order[item.name])
                    if row.get("low") is not None and row.get("high") is not None:
                        axes.hlines(y, row["low"], row["high"], color=colour, linewidth=2.6)
                    (dot,) = axes.plot([row["speed_up"]], [y], marker=svg.marker(order[item.name]), markersize=7,
                                       color=colour)  # fmt: skip
                    svg.gid(dot, tips, f"{item.name}, {step} at once: {row['speed_up']:.3g} times float")
                    # On the side away from the line.
                    ends = [row["speed_up"], row.get("low") or row["speed_up"], row.get("high") or row["speed_up"]]
                    left = max(ends) < 1
                    axes.annotate(f"slower {row['speed_up']:.2f}x" if slower else f"{row['speed_up']:.2f}x",
                                  (min(ends) if left else max(ends), y), xytext=(-8 if left else 8, 0),
                                  ha="right" if left else "left", textcoords="offset points", va="center", fontsize=8.4,
                                  color=ink("bad") if slower else ink("fg"))  # fmt: skip
                    ticks.append(y)
                    names.append(svg.short(item.name))
                    y += 1
        axes.axvline(1, color=ink("muted"), linewidth=1.3)
        axes.annotate("as fast as float", (1, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                      textcoords="offset points", color=ink("muted"), fontsize=8.2)  # fmt: skip
        low, high = axes.get_xlim()
        low, high = min(low, 0.95), max(high, 1.05)
        axes.set_xlim(low - (0.25 if low < 0.95 else 0.05) * (high - low), high + 0.12 * (high - low))
        axes.set_ylim(y - 0.4, -0.9)
        axes.set_yticks(ticks, names)
        for tick, name in zip(axes.get_yticklabels(), names, strict=True):
            tick.set_fontweight("bold" if name.endswith("at once") else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens/s over the float model's, same session")
        return svg.finish(
            figure, "speed-up", title="Speed-up over the float model", tips=tips,
            description="; ".join(f"{item.name} at {row['concurrency']}: {row['speed_up']:.2f}" for item in runs
                                  for row in item.speed["ratios"] if row.get("speed_up") is not None),
            caption="Right of the line is faster than float. Where an interval crosses it, no difference was shown.",
        )  # fmt: skip


def tasks(rows: Sequence[Row], order: Mapping[str, int], limit: float | None) -> Plot | None:
    """The kept share of float's score on each task, with intervals."""
    kept = [row for row in rows if row.get("recovery") is not None and math.isfinite(row["recovery"])]
    if not kept:
        return None
    tips: dict[str, str] = {}
    with svg.canvas(680, 96 + 22 * len(kept) + 16 * len({_task(row) for row in kept})) as figure:
        axes = figure.add_subplot()
        ticks: list[float] = []
        names: list[str] = []
        left, y = _from(kept, limit), 0.0
        for name in dict.fromkeys(map(_task, kept)):
            ticks.append(y)
            names.append(name)
            y += 1
            for row in (row for row in kept if _task(row) == name):
                place = order[row["variant"]]
                if 100 * row["recovery"] < left:
                    axes.annotate(f"◂ {100 * row['recovery']:.1f} %", (left, y), xytext=(3, 0), textcoords="offset points",
                                  va="center", color=svg.colour(place), fontsize=8.4)  # fmt: skip
                elif row.get("recovery_low") is not None and row.get("recovery_high") is not None:
                    ends = 100 * row["recovery_low"], 100 * row["recovery_high"]
                    axes.hlines(y, *ends, color=svg.colour(place), linewidth=2.6)
                (dot,) = axes.plot([100 * row["recovery"]], [y], marker=svg.marker(place), markersize=6.5,
                                   color=svg.colour(place))  # fmt: skip
                svg.gid(dot, tips, f"{row['variant']}, {name}: {100 * row['recovery']:.4g} % kept")
                ticks.append(y)
                names.append(svg.short(row["variant"]))
                y += 1
        axes.axvline(100, color=ink("muted"), linewidth=1.3)
        if limit is not None:
            axes.axvline(100 * limit, color=ink("bad"), linewidth=1.1)
            axes.annotate("limit", (100 * limit, 1), xycoords=("data", "axes fraction"), xytext=(-3, -9), ha="right",
                          textcoords="offset points", color=ink("bad"), fontsize=8.2)  # fmt: skip
        axes.set_ylim(y - 0.4, -0.9)
        known = {svg.short(name) for name in order}
        right = max([100.0, *(100 * (row.get("recovery_high") or row["recovery"]) for row in kept)])
        axes.set_xlim(left, right + 0.04 * (right - left))
        axes.set_yticks(ticks, names)
        for tick, name in zip(axes.get_yticklabels(), names, strict=True):
            tick.set_fontweight("normal" if name in known else "bold")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of the float model's score that is kept, %")
        return svg.finish(
            figure, "tasks", title="What is kept of the float model's score", tips=tips,
            description="; ".join(f"{row['variant']} {_task(row)} {100 * row['recovery']:.1f} %" for row in kept),
            caption="100 % is the float model. If an interval contains 100 %, the task did not show a difference.",
        )  # fmt: skip


def _from(rows: Sequence[Row], limit: float | None) -> float:
    """The start of the axis: a variant with a very low score must not compress the others."""
    lows: list[float] = [100 * (row.get("recovery_low") or row["recovery"]) for row in rows]
    floor = 100 * (limit if limit is not None else 0.95) - 20
    return min(99.0, max(min(lows), floor) - 1)


def _task(row: Row) -> str:
    return f"{row['task']} ({row['engine']})" if row.get("engine") else str(row["task"])


def monitor(item: Evidence) -> Plot | None:
    """Memory and utilisation of a variant's stages in sequence on one time axis, one panel per kind."""
    stages = [stage for stage in item.results if item.monitor(stage).get("samples")]
    kinds = [kind for kind in (_memory, _load, _gpu_memory) if any(kind(item.monitor(stage)) for stage in stages)]
    if not kinds:
        return None
    begins = [0.0]
    for stage in stages:
        begins.append(begins[-1] + max(_series(item.monitor(stage), "seconds") or [0.0]))
    total = begins[-1] or 1.0
    with svg.canvas(900, 46 + 120 * len(kinds)) as figure:
        for row, kind in enumerate(kinds):
            axes = figure.add_subplot(len(kinds), 1, row + 1)
            labelled: set[str] = set()
            for stage, begin, end in zip(stages, begins, begins[1:], strict=False):
                axes.axvline(begin, color=ink("line"), linewidth=0.8)
                if row == 0 and end - begin > 0.009 * total * len(stage):
                    axes.annotate(stage, (begin, 1), xycoords=("data", "axes fraction"), xytext=(2, 2), fontsize=8.2,
                                  textcoords="offset points", color=ink("muted"))  # fmt: skip
                seconds = [begin + second for second in _series(item.monitor(stage), "seconds") or []]
                for at, (label, values) in enumerate(kind(item.monitor(stage)).items()):
                    axes.plot(_thinned(seconds), _thinned(values), color=svg.colour(at + 1), linewidth=1.3,
                              label="" if label in labelled else label)  # fmt: skip
                    labelled.add(label)
            axes.set_xlim(0, total)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(_UNITS[kind.__name__])
            axes.tick_params(labelbottom=row == len(kinds) - 1)
            if len(labelled) > 1:
                axes.legend(loc="upper right", fontsize=7.8, handlelength=1.2, ncols=len(labelled))
        axes.set_xlabel("seconds, one stage after the other")
        peaks = "; ".join(
            f"{stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in peak.items() if value is not None)
            for stage in stages if (peak := item.monitor(stage).get("peak"))
        )  # fmt: skip
        return svg.finish(
            figure, f"monitor-{item.name}", title=f"Memory and load while the stages of {item.name} ran",
            description=f"Peaks: {peaks}.",
            caption=f"{item.name}: {', '.join(stages)}; the time before each began is left out.",
        )  # fmt: skip


_UNITS = {"_memory": "memory, GB", "_load": "load, %", "_gpu_memory": "GPU, GB"}


def _series(monitor: Row, name: str) -> list[float] | None:
    columns = list(monitor.get("columns") or [])
    if name not in columns:
        return None
    at = columns.index(name)
    values = [sample[at] for sample in monitor["samples"]]
    return [math.nan if value is None else float(value) for value in values]


def _matching(monitor: Row, *parts: str, factor: float = 1.0) -> dict[str, list[float]]:
    found = {}
    for name in monitor.get("columns") or []:
        if all(part in name for part in parts) and "total" not in name:
            found[name.replace("_bytes", "").replace("_", " ")] = [
                value * factor for value in _series(monitor, name) or []
            ]
    return found


def _memory(monitor: Row) -> dict[str, list[float]]:
    own = _series(monitor, "rss_bytes")
    return {} if own is None else {"its processes": [value / 1e9 for value in own]}


def _load(monitor: Row) -> dict[str, list[float]]:
    cpu = _series(monitor, "cpu_percent")
    return ({} if cpu is None else {"CPU": cpu}) | _matching(monitor, "gpu", "utili")


def _gpu_memory(monitor: Row) -> dict[str, list[float]]:
    return _matching(monitor, "gpu", "memory", factor=1e-9)


def _thinned(values: Sequence[float]) -> list[float]:
    every = max(1, math.ceil(len(values) / _POINTS))
    return list(values[::every])
