"""One kind of progress bar for everything that takes long; silent where stderr is no terminal but for milestones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Something that shows how far a piece of work is."""

    def update(self, done: float, total: float, label: str = "") -> None:
        """Show `done` of `total`."""


class _Bar:
    def __init__(self, label: str) -> None:
        from tqdm import tqdm

        self._label = label
        self._bar = tqdm(
            total=1, desc=label, leave=True, file=sys.stderr, dynamic_ncols=True, disable=not sys.stderr.isatty(),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.4g}/{total:.4g} [{elapsed}<{remaining}]",
        )  # fmt: skip

    def update(self, done: float, total: float, label: str = "") -> None:
        self._bar.total = total
        self._bar.n = done
        self._bar.set_description(f"{self._label}: {label}" if label else self._label, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


@contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A progress bar on stderr for the time of a `with` block."""
    shown = _Bar(label)
    try:
        yield shown
    finally:
        shown.close()
