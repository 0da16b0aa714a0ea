from __future__ import annotations

import math

import pytest
from sections import limits

from quantline.config.limits import ALARMS
from quantline.core.errors import ConfigError, QuantlineError
from quantline.evaluation.thresholds import raised, refuse
from quantline.pipeline.config import parse

LIMITS = limits(kl_divergence=0.1, top1_agreement=0.9)


def names(measured, asked):
    return [flag.instrument for flag in raised(measured, asked)]


def test_at_its_limit_a_measurement_is_sound_and_beyond_it_is_not():
    assert names({"kl_divergence": 0.1, "top1_agreement": 0.9}, LIMITS) == []
    assert names({"kl_divergence": 0.1001, "top1_agreement": 0.8999}, LIMITS) == ["kl_divergence", "top1_agreement"]


def test_what_is_no_number_is_beyond_every_limit():
    assert names({"kl_divergence": math.nan, "top1_agreement": 1.0}, LIMITS) == ["kl_divergence"]


def test_what_was_not_measured_or_has_no_limit_raises_nothing():
    assert names({"perplexity_increase": 9.0}, LIMITS) == []


def test_an_alarm_says_what_was_found_what_is_allowed_and_where_to_change_it():
    (flag,) = raised({"top1_agreement": 0.5}, LIMITS)
    assert (flag.value, flag.limit) == (0.5, 0.9)
    assert "50.0 %" in flag.message
    assert "at least 90 % (evaluate.limits.top1_agreement=0.9)" in flag.message
    (flag,) = raised({"kl_divergence": 0.25}, limits(kl_divergence=0.1))
    assert "0.250 nats a token from the float model's; at most 0.1 (evaluate.limits.kl_divergence=0.1)" in flag.message


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ({"first_divergence": 4}, 1.0, "diverge from the float model's within 1 token; at least 4 tokens ("),
        ({"first_divergence": 4}, 2.5, "within 2.5 tokens; at least 4 tokens ("),
        ({"perplexity_increase": 0.125}, 0.2672, "the perplexity grew by 26.7 %; at most 12.5 % ("),
        ({"changed_files": 0}, 1, "does not hold for 1 file of the checkpoint; at most 0 files ("),
    ],
)
def test_an_alarm_writes_its_value_as_the_report_does(limit, value, said):
    metric = ALARMS[next(iter(limit))].metric
    assert said in raised({metric: value}, limits(**limit))[0].message


def test_only_the_named_instruments_fail():
    flags = raised({"kl_divergence": 1.0}, LIMITS)
    refuse(flags, ["top1_agreement"])
    with pytest.raises(QuantlineError, match=r"evaluate\.fail_on=kl_divergence: "):
        refuse(flags, ["kl_divergence", "top1_agreement"])


def test_every_measurement_with_a_limit_may_fail_the_stage_and_no_other_may(composed):
    options = parse(composed()).evaluate
    assert list(options.limits.model_dump()) == list(ALARMS)
    assert parse(composed(f"evaluate.fail_on=[{','.join(ALARMS)}]")).evaluate.fail_on == list(ALARMS)
    with pytest.raises(
        ConfigError, match=r"evaluate\.fail_on\.0=loss: allowed are perplexity_increase, .* or restored_share"
    ):
        parse(composed("evaluate.fail_on=[loss]"))


def test_without_limits_nothing_raises_an_alarm():
    assert raised({"kl_divergence": 9.0}, None) == []


def test_without_instruments_the_text_and_the_limits_stay(composed):
    bare, full = (parse(composed(f"instruments={name}")).evaluate for name in ("none", "default"))
    assert (bare.divergence.tokens, bare.generations.prompts, bare.restore.layers) == (0, 0, 0)
    assert full.divergence.tokens
    assert full.generations.prompts
    assert full.restore.layers
    assert (bare.protocol(), bare.limits) == (full.protocol(), full.limits)
