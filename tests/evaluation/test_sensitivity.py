from __future__ import annotations

import numpy as np
import pytest
from sections import bootstrap, protocol

from quantline.data.windows import cut_documents
from quantline.evaluation.sensitivity import changes, outlier, read_layers, shares, summarize, write_table

HEADER = "name,layer,module,output_error,weight_error,weight_error_max,weight_error_mean,level"
WINDOWS = cut_documents([("a", [1, 2, 3]), ("b", [4, 5, 6])], protocol(window=3, stride=3), [])


def table(folder, *rows):
    (folder / "coverage").mkdir()
    (folder / "coverage" / "layers.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return read_layers(folder)


@pytest.fixture
def rows(tmp_path):
    return table(
        tmp_path, "l0.up,0,up,0.1,0.2,1.0,0.01,moderate", "l0.down,0,down,0.3,0.4,2.0,0.03,high", "l1.up,1,up,,0.6,3.0,0.05,"
    )  # fmt: skip


def test_without_a_table_or_measured_errors_there_is_nothing_to_analyse(tmp_path):
    assert read_layers(tmp_path) == []
    assert table(tmp_path, "l0.up,0,up,,,,,") == []


def test_errors_are_summed_up_by_layer_and_by_kind_of_module(rows):
    summary = {(row["by"], row["key"]): row for row in summarize(rows)}
    assert list(summary) == [("layer", 0), ("layer", 1), ("module", "down"), ("module", "up")]
    first = summary["layer", 0]
    assert (first["linears"], first["output_error_max"], first["output_error_mean"]) == (2, 0.3, pytest.approx(0.2))
    assert (first["weight_error_relative_max"], first["weight_error_max"], first["worst"]) == (0.4, 2.0, "l0.down")
    assert (first["low"], first["moderate"], first["high"]) == (0, 1, 1)
    assert summary["layer", 1]["output_error_mean"] is None
    assert summary["module", "up"]["weight_error_mean"] == pytest.approx(0.03)


def test_experts_are_one_kind(tmp_path):
    rows = table(tmp_path, *(f"l0.{n},0,mlp.experts.{n}.w1,0.1,0.1,0.1,0.1,low" for n in range(3)))
    assert [(row["key"], row["linears"]) for row in summarize(rows)] == [(0, 3), ("mlp.experts.*.w1", 3)]


def test_a_change_is_of_one_kind_of_error_and_of_the_linears_that_have_it(rows):
    judged = [
        {"name": "l0.up", "output_error": 0.1, "weight_error": 9.0},
        {"name": "l0.down", "output_error": 0.33, "weight_error": 0.4},
        {"name": "l1.up", "output_error": None, "weight_error": 0.3},
    ]
    assert changes(rows, judged, "output_error") == {"l0.up": 0.0, "l0.down": pytest.approx(0.1)}
    assert changes(rows, judged, "weight_error")["l1.up"] == 0.5


def test_a_restored_linears_share_is_what_the_loss_and_the_divergence_fall_by(rows):
    logprobs = -np.array([[0, 1, 2, 0, 3, 2], [0, 1, 1, 0, 2, 2]], np.float32)
    kl = np.array([[np.nan, 0.2, 0.2, np.nan, 0.2, 0.2], [np.nan, 0.1, 0.1, np.nan, 0.1, 0.1]], np.float32)
    (row, other) = shares(
        WINDOWS, places=[{"name": "l0.up", "tensor": 1, "note": ""}, {"name": "l1.up", "tensor": None, "note": "fused"}],
        logprobs=logprobs, kl=kl, floats=np.array([1.5, 3.5]), rows=rows,
        how=bootstrap(resamples=200, level=0.9),
    )  # fmt: skip
    assert row["nll_difference_restored"] == pytest.approx((6 - 5) / 4)
    assert row["recovered_nll"] == row["recovered_low"] == row["recovered_high"] == pytest.approx(0.5)
    assert row["recovered_share"] == pytest.approx(2 / 3)
    assert (row["kl_restored"], row["recovered_kl_share"]) == (pytest.approx(0.1), pytest.approx(0.5))
    assert (other["note"], other["recovered_nll"], other["layer"]) == ("fused", None, 1)


def test_a_variant_that_lost_nothing_has_no_shares(rows):
    (row,) = shares(
        WINDOWS, places=[{"name": "l0.up", "tensor": 1, "note": ""}], logprobs=-np.ones((2, 6), np.float32),
        kl=np.zeros((2, 6), np.float32), floats=np.array([2.0, 2.0]), rows=rows,
        how=bootstrap(resamples=200, level=0.9),
    )  # fmt: skip
    assert (row["recovered_share"], row["recovered_kl_share"], row["recovered_nll"]) == (None, None, 0.0)


def test_tables_hold_six_digits(tmp_path):
    write_table(tmp_path / "t.csv", [{"a": 1 / 3, "b": "x", "c": 0}], ["a", "b"])
    assert (tmp_path / "t.csv").read_text() == "a,b\n0.333333,x\n"


def test_an_outlier_stands_out_among_linears_of_its_kind_and_bits(tmp_path):
    kinds = {"up": (0.1, 0.1, 0.3), "down": (0.9, 0.9, 1.0), "gate": (0.01, 9.0)}  # two gates are no peers
    lines = [f"l{n}.{kind},{n},{kind},{e},0.1,0.1,0.1,low" for kind, es in kinds.items() for n, e in enumerate(es)]
    rows = table(tmp_path, *lines)
    assert outlier(rows, rows) == ("l2.up", pytest.approx(3.0))
    assert outlier(rows[:2], rows) is None
