from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quantline.report import plots


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / "data" / f"{name}.json").read_text())


def test_a_variant_that_no_other_beats_in_both_is_on_the_pareto_front() -> None:
    found = [("a", 1, 9.0), ("b", 2, 3.0), ("c", 2, 4.0), ("d", 3, 3.0), ("e", 4, 1.0), ("f", 5, None)]
    rows = [{"variant": name, "size_bytes": size, "difference_percent": loss} for name, size, loss in found]
    assert plots.pareto(rows) == ["a", "b", "e"]


def _row(name: str, size: float, change: float, low: float, high: float) -> dict[str, Any]:
    return {"variant": name, "baseline": name == "float", "size_bytes": size * 1e6, "difference_percent": change,
            "difference_low_percent": low, "difference_high_percent": high}  # fmt: skip


def _texts(drawn: str) -> list[tuple[float, str]]:
    """Each text of a drawing with its distance from the top."""
    found = re.findall(r'<text [^>]*?(?:y="([\d.-]+)"|translate\([\d.-]+ ([\d.-]+)\))[^>]*>([^<]*)<', drawn)
    return [(float(first or second), text) for first, second, text in found]


@pytest.mark.parametrize("change", [(-0.35, -1.9, 1.2), (-1.35, -1.9, -0.8), (-12.0, -18.0, -8.0), (0.1, 0.05, 0.2)])
def test_every_name_and_the_limit_are_inside_the_picture(change: tuple[float, float, float]) -> None:
    rows = [_row("float", 18.9, 0.0, 0.0, 0.0), _row("gptq-w4", 7.3, *change)]
    drawn = plots.quality_size(rows, {"float": 0, "gptq-w4": 1}, 3.0, "gptq-w4")
    assert drawn is not None
    places = {text: y for y, text in _texts(drawn.drawn)}
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawn.drawn)[1])  # type: ignore[index]
    for text in ("limit 3 %", "gptq-w4", "float"):
        assert 8 < places[text] < height - 40, (text, places)


def test_a_picture_of_losses_and_gains_has_marks_on_both_sides() -> None:
    rows = [
        _row("float", 18.9, 0.0, 0.0, 0.0),
        _row("w4", 7.3, -12.0, -18.0, -8.0),
        _row("w2", 5.3, 120.0, 110.0, 130.0),
    ]
    drawn = plots.quality_size(rows, {"float": 0, "w4": 1, "w2": 2}, 3.0, None)
    assert drawn is not None
    assert {"-10", "0", "10", "100"} <= {text for _, text in _texts(drawn.drawn)}
