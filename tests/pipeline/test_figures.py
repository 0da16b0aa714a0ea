from __future__ import annotations

import math
from pathlib import Path

import pytest
from variant_records import record

from quantline.pipeline.figures import figures_of, measured


def test_a_loss_without_bound_is_written_as_a_word() -> None:
    assert figures_of({"perplexity": math.inf, "kl_divergence": math.nan}) == {"perplexity": "inf", "kl": "nan"}


def test_speed_up_is_the_geometric_mean_over_the_requests_at_once(tmp_path: Path) -> None:
    one = record("awq-w4-g128", "awq", 4, 0.01, tmp_path)
    one.results[-1]["metrics"].update(speed_up_c1=1.0, speed_up_c4=4.0)
    assert one.results[-1]["stage"] == "speed"
    assert measured(one)["speed_up"] == pytest.approx(2.0)


def test_float_model_has_no_distance_from_itself_and_no_alarms(tmp_path: Path) -> None:
    baseline = record("float", "float", 16, 0.0, tmp_path, stages=("evaluate",))
    baseline.results[0]["metrics"].update(kl_divergence=0.0, alarms=0.0)
    row = measured(baseline)
    assert (row["difference_percent"], row["kl_divergence"], row["alarms"]) == (None, None, None)


def test_bits_of_a_mixture_of_types_are_those_of_its_linears(tmp_path: Path) -> None:
    mixed = record("gguf-Q4_K_M", "awq", 4, 0.01, tmp_path)
    mixed.config["method"] = {"name": "gguf", "type": "Q4_K_M", "imatrix": True}
    next(one for one in mixed.results if one["stage"] == "quantize")["metrics"]["effective_bits"] = 5.4896
    assert measured(mixed)["bits"] == 5.49
    assert measured(record("awq", "awq", 4, 0.01, tmp_path))["bits"] == 4
