from __future__ import annotations

from pathlib import Path

import report_records

from quantline.report import layer_plots
from quantline.report.evidence import gather


def test_a_model_of_many_layers_is_drawn_without_numbers(tmp_path: Path) -> None:
    (_, item) = gather(report_records.records(tmp_path, names=["gptq-w4-g128"]), tmp_path / "artifacts")
    object.__setattr__(item, "layers", report_records.layer_rows(0.2, layers=60))
    (plot,) = layer_plots.heat_maps([item])
    assert plot.drawn.count("<text") < 60
    assert plot.width > 1000
