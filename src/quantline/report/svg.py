"""Adapts matplotlib's SVG to the page: real text in the page's font, colours of its theme, titles for screen readers.

Figures are drawn in the `INK` colours below. In a page each becomes a CSS variable, so that one drawing serves light and
dark; in a file of its own it becomes the light theme's colour. Equal figures give equal bytes: no dates, ids by a fixed
salt.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name -> (the colour that it is drawn in, the colour of a file of its own)
INK = {
    "fg": ("#010101", "#1b1f24"), "muted": ("#020202", "#5b6570"), "line": ("#030303", "#d5dae0"),
    "bg": ("#040404", "#ffffff"), "bad": ("#050505", "#b3261e"), "good": ("#060606", "#14683d"),
    "warn": ("#070707", "#9a6700"),
    "c0": ("#080808", "#6b7480"), "c1": ("#090909", "#0b66c3"), "c2": ("#0a0a0a", "#c2510c"), "c3": ("#0b0b0b", "#0d8567"),
    "c4": ("#0c0c0c", "#a03e96"), "c5": ("#0d0d0d", "#96750a"), "c6": ("#0e0e0e", "#3d51b5"), "c7": ("#0f0f0f", "#b0304f"),
    "c8": ("#101010", "#51751e"),
}  # fmt: skip
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
_LIGHT = dict(INK.values())
_VARIABLES = {drawn: f"var(--{name})" for name, (drawn, _) in INK.items()}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "quantline", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.linewidth": 0.8, "lines.linewidth": 1.6, "path.simplify": True,
    "text.color": INK["fg"][0], "axes.labelcolor": INK["fg"][0], "axes.edgecolor": INK["muted"][0],
    "xtick.color": INK["muted"][0], "ytick.color": INK["muted"][0], "xtick.labelcolor": INK["fg"][0],
    "ytick.labelcolor": INK["fg"][0], "grid.color": INK["line"][0], "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "legend.labelcolor": INK["fg"][0], "axes.titlecolor": INK["fg"][0],
}  # fmt: skip


def ink(name: str) -> str:
    """The colour of this role."""
    return INK[name][0]


def colour(position: int) -> str:
    """The colour of the variant at a place in the order; 0 is the float model."""
    return ink("c0") if position == 0 else ink(f"c{(position - 1) % 8 + 1}")


def short(name: str, most: int = 32) -> str:
    """A variant's name beside an axis: of a long one the beginning and the end, since it would take the axis' room."""
    return name if len(name) <= most else f"{name[: most - 13]}…{name[-12:]}"


def marker(position: int) -> str:
    """The marker of the variant at a position in the order, so that variants differ in more than colour."""
    return MARKERS[position % len(MARKERS)]


@dataclass(frozen=True)
class Plot:
    """A drawn figure. title, description: for screen readers. caption: how to read it. width: in pixels."""

    name: str
    title: str
    description: str
    caption: str
    drawn: str
    width: int

    @property
    def inline(self) -> str:
        """The drawing for the page."""
        return _recoloured(self.drawn, _VARIABLES)

    @property
    def file(self) -> str:
        """The drawing as a file of its own, on white."""
        text = _recoloured(self.drawn, _LIGHT).replace("var(--sans)", "sans-serif")
        text = text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        head, mark, rest = text.partition(">")
        return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{mark}<rect width="100%" height="100%" fill="#fff"/>{rest}\n'


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in pixels (96 an inch), in the report's style."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width / 96, height / 96), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def finish(
    figure: Figure, name: str, *, title: str, description: str, caption: str, tips: Mapping[str, str] | None = None
) -> Plot:
    """The figure as a `Plot`.

    tips: gid of an artist -> the tooltip.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: (?:[a-z]+ )?(?:\d+ )?[\d.]+px) [^;\"]*", r"\1 var(--sans)", text)
    for gid, tip in (tips or {}).items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(tip)}</title>')
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    width, height = (round(float(size) * 96) for size in figure.get_size_inches())
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    head = (
        f'<svg {box[0]} width="{width}" height="{height}" role="img" aria-labelledby="{name}-title {name}-desc" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    text = head + text[text.index(">") + 1 :]
    return Plot(name, title, description, caption, re.sub(r"\n\s*", "\n", text), width)


def _recoloured(text: str, colours: Mapping[str, str]) -> str:
    return re.sub("|".join(colours), lambda found: colours[found[0]], text)


def gid(artist: Any, tips: dict[str, str], tip: str) -> None:
    """Give an artist a tooltip."""
    name = f"tip{len(tips)}"
    artist.set_gid(name)
    tips[name] = tip
