from __future__ import annotations

import pytest

from quantline.pipeline.told import told

EVALUATE = {
    "reference_perplexity": 12.961345, "nll_difference": 0.0243193, "nll_difference_low": 0.0225330,
    "nll_difference_high": 0.0261189, "kl_divergence": 0.0261258, "top1_agreement": 0.9066595, "size_bytes": 7260160,
    "documents": 186, "bits_per_byte": 1.0158, "tokens_scored": 85697,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "metrics", "line"),
    [
        ("download", {"files": 5, "size_bytes": 19159793, "probe_seconds": 7.6}, "19.2 MB in 5 files"),
        ("calibrate", {"samples": 32, "tokens": 16384}, "32 samples of 16384 tokens together"),
        (
            "evaluate", EVALUATE,
            "perplexity 12.96, +2.46 % [+2.28, +2.65] against float, KL 0.0261 nats/token, same likeliest token 90.7 %, "
            "7.26 MB",
        ),
        ("evaluate", {**EVALUATE, "nll_difference": 0.0}, "perplexity 12.96, 7.26 MB"),
        ("tasks", {"task/choice/vllm": 0.665, "recovery/choice/vllm": 1.0153}, "choice/vllm 0.665 (102 % of float's)"),
        ("speed", {"speed_up_c1": 1.31, "speed_up_c8": 0.9, "ttft_ms_c1": 2.0},
         "1.31x as fast as float with 1 at a time, 0.90x as fast as float with 8 at a time"),
        ("convert", {"linears": 35, "largest_relative_weight_difference": 0.0}, "35 linears, no weight changed"),
        ("noise", {f"m{at}": 1.5 for at in range(9)},
         "m0 1.500, m1 1.500, m2 1.500, m3 1.500, m4 1.500, m5 1.500, and 3 more"),
    ],
)  # fmt: skip
def test_a_stage_tells_in_one_line_what_is_looked_for_first(stage, metrics, line):
    assert told(stage, metrics) == line


def test_a_stage_that_was_asked_for_nothing_says_so():
    assert told("tasks", {}) == "nothing to do: no tasks are chosen (tasks=none)"
    assert "speed=none" in told("speed", {})
    assert told("speed", {}, refused=True) == ""


@pytest.mark.parametrize("stage", ["download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate"])
def test_what_was_not_measured_is_not_told(stage):
    assert told(stage, {}) == ""
