"""One scale of progress for work in several parts, so that its bar goes from 0 to 100 % once and its estimate of the time
left is of all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantline.toolchains.protocol import Reporter

Report = Callable[[int, int, str], None]


class Parts:
    """Parts of work that are done one after the other.

    sizes: part -> its size, in a unit that takes about as long in every part, such as tokens through one model.
    """

    def __init__(self, report: Report, sizes: Mapping[str, float]) -> None:
        self._report = report
        self._total = max(1, round(sum(sizes.values())))
        self._sizes = dict(sizes)
        self._begins: dict[str, float] = {}
        begin = 0.0
        for name, size in sizes.items():
            self._begins[name] = begin
            begin += size

    def of(self, name: str, label: str) -> Reporter:
        """How a part reports its own steps."""
        return _Part(self._report, self._total, self._begins[name], self._sizes[name], label)


@dataclass(frozen=True)
class _Part(Reporter):
    report: Report
    whole: int
    begin: float
    size: float
    name: str

    def __call__(self, done: int, total: int, label: str = "") -> None:
        self.report(round(self.begin + done / max(1, total) * self.size), self.whole, self.name)
