"""Rows and ratios of made-up rounds, computed by hand; the table that they make."""

from __future__ import annotations

import pytest

from quantline.evaluation.speed.ratios import medians, metrics_of, ratios
from quantline.evaluation.speed.run import nothing
from quantline.evaluation.speed.table import render_speed_table, speed_rows
from quantline.evaluation.speed.vllm_bench import MEASURED


def row(model, concurrency, number, speed):
    return {**dict.fromkeys(MEASURED, 10.0), "model": model, "concurrency": concurrency, "round": number,
            "output_tokens_per_second": speed}  # fmt: skip


ROUNDS = [
    row("float", 1, 0, 100.0), row("variant", 1, 0, 200.0), row("float", 1, 1, 50.0), row("variant", 1, 1, 400.0),
    row("float", 8, 0, 100.0), row("variant", 8, 0, 80.0), row("float", 8, 1, 100.0), row("variant", 8, 1, 90.0),
]  # fmt: skip


def document(rounds=ROUNDS):
    servers = [
        {"model": "float", "load_seconds": 20.0, "weights_memory_bytes": 4_000_000_000, "peak_memory_bytes": 6e9},
        {"model": "variant", "load_seconds": 10.0, "weights_memory_bytes": 1_000_000_000, "peak_memory_bytes": 2e9},
    ]
    session = {"input_tokens": 64, "output_tokens": 32, "device_name": "a chip", "side_by_side": True, "rounds": 2,
               "weights_memory_is": "as reported"}  # fmt: skip
    return {
        **nothing(), "session": session, "servers": servers, "rounds": rounds, "rows": medians(rounds),
        "ratios": ratios(rounds),
    }  # fmt: skip


def test_a_row_is_the_median_over_the_rounds_of_its_model_and_concurrency():
    found = {(each["model"], each["concurrency"]): each for each in medians(ROUNDS)}
    assert len(found) == 4
    assert found["float", 1]["output_tokens_per_second"] == 75.0
    assert found["variant", 8]["output_tokens_per_second"] == 85.0
    assert found["variant", 8]["rounds"] == 2


def test_ratios_pair_the_rounds_and_give_their_geometric_mean_and_extremes():
    one, eight = ratios(ROUNDS)
    assert (one["concurrency"], one["low"], one["high"], one["rounds"]) == (1, 2.0, 8.0, 2)
    assert one["speed_up"] == pytest.approx(4.0)
    assert not one["slower_than_float"]
    assert (eight["low"], eight["high"], eight["slower_than_float"]) == (0.8, 0.9, True)


def test_a_variant_that_is_slower_in_one_round_only_is_not_called_slower():
    mixed = [
        row("float", 1, 0, 100.0),
        row("variant", 1, 0, 50.0),
        row("float", 1, 1, 100.0),
        row("variant", 1, 1, 101.0),
    ]
    (ratio,) = ratios(mixed)
    assert ratio["speed_up"] < 1
    assert ratio["slower_than_float"] is False


def test_a_round_that_only_one_model_ran_is_no_ratio():
    with pytest.raises(ValueError, match="zip"):
        ratios(ROUNDS[:3])


def test_metrics_are_named_by_their_concurrency():
    metrics = metrics_of(document())
    assert metrics["output_tokens_per_second_c1"] == 300.0
    assert metrics["speed_up_c1"] == pytest.approx(4.0)
    assert (metrics["ttft_ms_c8"], metrics["itl_ms_c8"]) == (10.0, 10.0)
    assert (metrics["weights_memory_bytes"], metrics["float_weights_memory_bytes"]) == (1e9, 4e9)
    assert metrics["slower_than_float"] == 1.0
    assert metrics_of(document(ROUNDS[:4]))["slower_than_float"] == 0.0


def test_nothing_measured_is_no_metric_and_no_table():
    assert metrics_of(nothing()) == {}
    assert render_speed_table(nothing()) == ""


def test_the_table_gives_each_speed_with_the_weights_memory_beside_it():
    rows = speed_rows(document())
    assert [(each["concurrency"], each["model"]) for each in rows] == [
        (1, "float"), (1, "variant"), (8, "float"), (8, "variant")
    ]  # fmt: skip
    assert rows[1]["memory_reduction"] == 0.75
    assert rows[0]["memory_reduction"] is None
    text = render_speed_table(document())
    assert "-75 %" in text
    assert "4.00x [2.00, 8.00]" in text
    assert "0.85x [0.80, 0.90] slower" in text
    assert "1.00 GB" in text
    assert "64 tokens in, 32 out" in text
