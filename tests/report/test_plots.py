from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantline.report import plots


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / "data" / f"{name}.json").read_text())


def test_a_variant_that_no_other_beats_in_both_is_on_the_pareto_front() -> None:
    found = [("a", 1, 9.0), ("b", 2, 3.0), ("c", 2, 4.0), ("d", 3, 3.0), ("e", 4, 1.0), ("f", 5, None)]
    rows = [{"variant": name, "size_bytes": size, "difference_percent": loss} for name, size, loss in found]
    assert plots.pareto(rows) == ["a", "b", "e"]
