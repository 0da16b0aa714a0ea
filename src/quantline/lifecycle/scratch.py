"""What lies in scratch/ and artifacts/: a line for each run, and the removal of runs made by hand."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from quantline.core.errors import UserError
from quantline.core.text import decimal_size
from quantline.pipeline.compose import read_params
from quantline.pipeline.paths import (
    BY_HAND,
    MANUAL_HOME,
    PIPELINE_HOME,
    SAVED,
    not_among,
    read_result,
    run_folder,
    run_names,
)
from quantline.pipeline.stages import PIPELINE

# Characters of a line of the table for everything but the name and the overrides: stage, change, size, age and gaps.
_OTHERS = 46
_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        name: `NAME` of the pipeline, `by-hand/NAME` of a manual run.
        folder: where its results lie.
        stages: those that have a result.
        made_of: its overrides, as typed.
        change_percent: growth of the perplexity over the float model's; None where it was not measured.
        size_bytes: of everything in the folder; a file of several names counts once.
        used_at: when its newest result was written, seconds since the epoch.
    """

    name: str
    folder: Path
    stages: tuple[str, ...]
    made_of: str
    change_percent: float | None
    size_bytes: int
    used_at: float


def entries(root: Path) -> list[Entry]:
    """All runs here, the pipeline's first. root: the checkout."""
    found = (_entry(root, name) for name in run_names(root, *PIPELINE))
    return [entry for entry in found if entry is not None]


def _entry(root: Path, name: str) -> Entry | None:
    folder = run_folder(root, name)
    if folder is None:
        return None
    results = {stage: folder / f"{stage}.json" for stage in PIPELINE if (folder / f"{stage}.json").is_file()}
    change = None
    if "evaluate" in results:
        ratio = read_result(results["evaluate"]).get("metrics", {}).get("perplexity_ratio")
        change = None if ratio is None else 100 * (float(ratio) - 1)
    stats = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = {stat.st_ino: stat.st_size for stat in stats}  # outputs may be links to the same file
    return Entry(
        name, folder, tuple(results), _overrides(root, name, folder), change, sum(sizes.values()),
        max((path.stat().st_mtime for path in results.values()), default=0.0),
    )  # fmt: skip


def _overrides(root: Path, name: str, folder: Path) -> str:
    if name.startswith(BY_HAND):
        saved = folder / SAVED
        values: dict[str, Any] = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
        return str(values.get("overrides", ""))
    try:
        known = set(read_params(root / "params.yaml")["variants"])
    except UserError:  # a damaged params.yaml is no reason to show nothing
        known = {name}
    return "a line of params.yaml" if name in known else "a line that params.yaml no longer has"


def table(found: Sequence[Entry], now: float | None = None, width: int = 120) -> str:
    """The runs as text, one a line of at most `width` characters: a long name loses its middle, long overrides their end."""
    now = time.time() if now is None else now
    longest = min(max((len(entry.name) for entry in found), default=0), width // 3)
    room = width - longest - _OTHERS
    rows = [
        [
            _shortened(entry.name, longest), entry.stages[-1],
            "" if entry.change_percent is None else f"{entry.change_percent:+.2f} %",
            decimal_size(entry.size_bytes), age(now - entry.used_at), _cut(entry.made_of, room),
        ]
        for entry in found
    ]  # fmt: skip
    headers = ["run", "done to", "change", "on disk", "age", "made of"]
    return str(tabulate(rows, headers, tablefmt="plain", disable_numparse=True)) if rows else "no results yet"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: max(0, most - 4)]} ..."


def _shortened(name: str, most: int) -> str:
    end = most // 3
    return name if len(name) <= most else f"{name[: most - end - 3]}...{name[-end:]}"


def age(seconds: float) -> str:
    """A time span in its largest unit: `3 d`, `2 h`, `5 min`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "now"


def selected(root: Path, names: Sequence[str], older: str | None, now: float | None = None) -> list[Entry]:
    """The manual runs to remove: those named, or those that are older than a span such as `7d`.

    Raises:
        UserError: a name is not that of a manual run, the span is not valid, or neither is given.
    """
    if not names and older is None:
        raise UserError(
            "run, older: neither is set; give run=NAME, or older=7d for all runs by hand of more than 7 days"
        )
    manual = {entry.name: entry for entry in entries(root) if entry.name.startswith(BY_HAND)}
    if names:
        return list(_named(names, manual))
    number = re.fullmatch(r"(\d+)([hdw])", str(older))
    if number is None:
        raise UserError(f"older={older}: is not a span; give a number with h, d or w, such as 12h or 7d")
    limit = (time.time() if now is None else now) - int(number[1]) * _UNITS[number[2]]
    return [entry for entry in manual.values() if entry.used_at < limit]


def _named(names: Sequence[str], manual: dict[str, Entry]) -> Iterator[Entry]:
    for name in names:
        full = name if name.startswith(BY_HAND) else BY_HAND + name
        if full not in manual:
            raise UserError(f"run={name}: {not_among(full, list(manual))}; only runs by hand are removed")
        yield manual[full]


def remove(root: Path, found: Sequence[Entry]) -> int:
    """Remove runs made by hand; returns the freed bytes. What the pipeline made stays: `stages.retention` is for that."""
    home = root / MANUAL_HOME
    for entry in found:
        if home not in entry.folder.parents:
            raise ValueError(f"{entry.folder}: is not in {home}; {PIPELINE_HOME}/ belongs to DVC")
        shutil.rmtree(entry.folder)
    return sum(entry.size_bytes for entry in found)
