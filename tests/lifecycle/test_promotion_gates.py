import copy
import math

import pytest

from quantline.config.promote import PromoteConfig
from quantline.lifecycle.promotion_gates import faults_of

GATES = PromoteConfig(
    max_perplexity_increase=0.05, served=True, layer_errors=True, min_recovery=0.95, max_alarms=1,
    alarms=["slower_than_float"],
)  # fmt: skip


@pytest.fixture
def results():
    """A variant that may be promoted."""
    stages = {stage: {"status": "ok", "metrics": {}} for stage in ("download", "quantize", "convert", "serve_smoke")}
    stages["quantize"]["metrics"] = {"linears_expected": 35, "linears_quantized": 35, "output_error_max": 0.1}
    metrics = {"nll_difference": 0.02, "nll_difference_high": math.log(1.0499)}
    return copy.deepcopy({**stages, "evaluate": {"status": "ok", "metrics": metrics}})


def test_a_variant_within_its_limits_may_be_promoted(results):
    assert faults_of(results, GATES) == []


@pytest.mark.parametrize(
    ("stage", "metrics", "fault"),
    [
        ("evaluate", {"nll_difference_high": math.log(1.051)}, "quality: perplexity may be +5.1 % against float"),
        ("evaluate", {"nll_difference_high": 1e9}, "quality: perplexity may be +inf %"),
        (
            "evaluate",
            {"nll_difference_high": None},
            "quality: the interval of the perplexity increase was not measured",
        ),
        ("evaluate", {"nll_difference_high": math.nan}, "quality: perplexity may be +nan %"),
        ("quantize", {"linears_quantized": 34}, "layer errors: 34 of 35 linears"),
        (
            "tasks",
            {"recovery/arc_easy/vllm": 0.94},
            "recovery: recovery/arc_easy/vllm is 0.94, required is promote.min_recovery=0.95",
        ),
        ("evaluate", {"alarms": 2.0}, "alarms: the evaluation raised 2, allowed is promote.max_alarms=1"),
        ("speed", {"slower_than_float": 1}, "alarms: slower_than_float is 1"),
    ],
)
def test_a_gate_that_does_not_hold_is_named_with_what_was_measured(results, stage, metrics, fault):
    results.setdefault(stage, {"status": "ok", "metrics": {}})["metrics"].update(metrics)
    (said,) = faults_of(results, GATES)
    assert said.startswith(fault)


def test_measured_values_within_the_limits_are_no_fault(results):
    results["tasks"] = {"status": "ok", "metrics": {"recovery/arc_easy/vllm": 0.95}}
    results["speed"] = {"status": "ok", "metrics": {"slower_than_float": 0}}
    assert faults_of(results, GATES) == []


def test_a_variant_that_is_not_served_is_refused_with_the_reason_unless_that_is_not_asked_for(results):
    results["serve_smoke"].update(status="unsupported", reason="no kernel")
    assert faults_of(results, GATES) == ["served: vLLM does not serve it, no kernel"]
    assert faults_of(results, GATES.model_copy(update={"served": False})) == []


def test_disabled_layer_errors_do_not_pass(results):
    del results["quantize"]["metrics"]["output_error_max"]
    assert faults_of(results, GATES) == ["layer errors: no error was measured; set layer_errors.enabled=true"]


def test_every_stage_that_is_missing_is_named(results):
    del results["evaluate"], results["convert"]
    assert [fault.partition(":")[0] for fault in faults_of(results, GATES)] == ["convert", "evaluate"]
