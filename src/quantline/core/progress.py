"""The progress bar of long work. Where stderr is no terminal, it prints a line now and then instead."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from quantline.core.text import percent

# Between two lines where stderr is not a terminal.
_MILESTONE_SECONDS = 30.0


class Progress(Protocol):
    """Something that shows the progress of a piece of work."""

    def update(self, done: float, total: float, label: str = "") -> None:
        """Show `done` of `total`."""


class _Bar:
    def __init__(self, label: str, milestones: bool) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # every update redraws the bar, so tqdm's monitor thread is not needed
        self._label = label
        self._milestones = milestones
        self._started = self._told = time.monotonic()
        self._bar = tqdm(
            total=1, desc=label, leave=True, file=sys.stderr, dynamic_ncols=True, disable=not sys.stderr.isatty(),
            bar_format="{desc}: {percentage:3.0f} %|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}]",
        )  # fmt: skip

    def update(self, done: float, total: float, label: str = "") -> None:
        self._milestone(done, total, label)
        self._bar.total = total
        self._bar.n = done
        self._bar.set_description(f"{self._label}: {label}" if label else self._label, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()

    def _milestone(self, done: float, total: float, label: str) -> None:
        """Without a terminal: print a line every 30 seconds, with an estimate of the time left."""
        now = time.monotonic()
        if (
            not self._milestones
            or not self._bar.disable
            or now - self._told < _MILESTONE_SECONDS
            or not 0 < done < total
        ):
            return
        self._told = now
        left = (now - self._started) / done * (total - done)
        print(f"{self._label}: {percent(done / total, 0)} after {_time(now - self._started)}, {_time(left)} left  {label}",
              file=sys.stderr, flush=True)  # fmt: skip


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


@contextmanager
def bar(label: str, *, milestones: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr during a `with` block.

    milestones: print the time left where stderr is not a terminal; not for a `total` that is a limit instead of work.
    """
    shown = _Bar(label, milestones)
    try:
        yield shown
    finally:
        shown.close()
