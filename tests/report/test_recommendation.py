from __future__ import annotations

from typing import Any

import pytest

from quantline.config.report import Judged, ReportConfig
from quantline.core.errors import ConfigError
from quantline.pipeline.config import parse
from quantline.report.recommendation import SPOKEN, recommend


def row(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "variant": name, "baseline": False, "difference_percent": 2.0, "difference_low_percent": 1.8,
        "difference_high_percent": 2.2, "served": True, "alarms": 0, "tasks_passed": True, "size_bytes": 7.0e6,
        "compression_ratio": 2.6, "speed_up": 1.2, **changes,
    }  # fmt: skip


FLOAT = row("float", baseline=True, difference_percent=None, difference_high_percent=None, size_bytes=19e6)


def test_the_smallest_of_those_that_meet_every_rule_is_recommended(rules: ReportConfig) -> None:
    found = recommend(
        [FLOAT, row("large", size_bytes=9e6), row("small"), row("tiny", size_bytes=2e6, served=False)], rules
    )
    assert found.chosen == "small"
    assert found.headline == "Ship small."
    assert "large and small meet every rule." in found.reasons
    assert "Of these small is the smallest (7.00 MB)." in found.reasons
    assert found.ruled_out == {"tiny": ["vLLM does not serve it here"]}
    assert found.passed_over == {"large": "size of the weights on disk 9.00 MB, against 7.00 MB of small"}


def test_sizes_within_five_per_cent_are_told_apart_by_speed_and_then_by_quality(rules: ReportConfig) -> None:
    near = [row("a", size_bytes=7.0e6, speed_up=1.0), row("b", size_bytes=7.3e6, speed_up=1.3)]
    assert recommend(near, rules).chosen == "b"
    near = [row("a", speed_up=1.30), row("b", speed_up=1.28, difference_percent=1.5)]
    assert recommend(near, rules).chosen == "b"
    assert recommend([row("a"), row("b")], rules).chosen == "a"


def test_speeds_whose_ranges_overlap_are_not_told_apart(rules: ReportConfig) -> None:
    slow = row("slow", speed_up=0.9, speed_up_low=0.8, speed_up_high=1.15, difference_percent=1.5)
    fast = row("fast", speed_up=1.3, speed_up_low=1.1, speed_up_high=1.5)
    found = recommend([fast, slow], rules)
    assert found.chosen == "slow"
    assert any("overlap with its range: no difference to choose by." in reason for reason in found.reasons)
    assert recommend([fast, {**slow, "speed_up_high": 1.09}], rules).chosen == "fast"


def test_tasks_without_a_limit_are_named_as_such(rules: ReportConfig) -> None:
    found = recommend([row("a", tasks_passed=None, recovery_lowest=0.985)], rules)
    assert found.chosen == "a"
    assert found.caveats == [
        "No limit is set for tasks (tasks.gate.min_recovery): the worst one keeps 98.5 % of the float model's score."
    ]


def test_the_whole_interval_must_be_below_the_limit(rules: ReportConfig) -> None:
    found = recommend([row("a", difference_percent=2.9, difference_high_percent=3.1)], rules)
    assert found.chosen is None
    assert found.ruled_out["a"] == [
        "By the upper end of its interval, the perplexity grows by 3.10 % (at most 3.00 % is allowed)"
    ]


def test_none_is_recommended_where_none_fits_and_every_failure_is_named(rules: ReportConfig) -> None:
    found = recommend(
        [FLOAT, row("a", alarms=2, served=False, refusal="no kernel"), row("b", tasks_passed=False)], rules
    )
    assert found.chosen is None
    assert found.headline == "None: keep serving the float model."
    assert found.ruled_out == {
        "a": ["vLLM does not serve it here: no kernel", "The evaluation's instruments raised 2 alarms (none is allowed)"],
        "b": ["It keeps too little of the float model's score on a task"],
    }  # fmt: skip


def test_a_missing_value_fails_or_is_a_caveat_by_its_rule(rules: ReportConfig) -> None:
    found = recommend([row("a", difference_high_percent=None)], rules)
    assert found.chosen is None
    assert "not measured, which the rules ask for" in found.ruled_out["a"][0]
    found = recommend([row("a", alarms=None), row("b", speed_up=None)], rules)
    assert found.chosen == "a"
    assert "Number of alarms: not measured, so this rule was not applied." in found.caveats
    assert "The speed-up over float of b was not measured, so it did not decide." in found.caveats


def test_slower_than_float_is_a_caveat_that_comes_first(rules: ReportConfig) -> None:
    found = recommend([row("a", slower_than_float=True, tasks_passed=None)], rules)
    assert found.chosen == "a"
    assert found.caveats[0].startswith("It is slower than the float model")


def test_infinite_growth_is_ruled_out(rules: ReportConfig) -> None:
    found = recommend([row("a", difference_percent=float("inf"), difference_high_percent=float("inf"))], rules)
    assert "grows by unbounded" in found.ruled_out["a"][0]


def test_custom_rules_get_a_sentence(rules: ReportConfig) -> None:
    values = rules.model_dump()
    values["rules"] = {"agreement": {"column": "top1_agreement_low", "at_least": 0.95, "missing": "fail"}}
    own = ReportConfig.model_validate(values)
    found = recommend([row("a", top1_agreement_low=0.9), row("b", top1_agreement_low=0.97)], own)
    assert found.chosen == "b"
    assert found.ruled_out["a"] == [
        "Lower end of the interval of the share of equal likeliest tokens: 90.0 % (at least 95.0 % is wanted)"
    ]


def test_every_column_that_can_be_judged_has_words() -> None:
    assert set(SPOKEN) == set(Judged.__args__)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("report.rules.quality.column=nonsense", "report.rules.quality.column=nonsense: allowed are"),
        ("report.rules.quality.at_most=null", "give exactly one of at_most, at_least and equals"),
        ("report.worst_layers=0", "report.worst_layers=0"),
    ],
)
def test_an_invalid_rule_is_refused(composed: Any, override: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault.replace(".", r"\.")):
        parse(composed(override))


def test_few_documents_are_a_reason_for_caution(rules: ReportConfig) -> None:
    found = recommend([FLOAT, row("small", documents=13)], rules)
    assert found.caveats[0].startswith("The intervals rest on 13 documents only")
    assert not any("documents" in caveat for caveat in recommend([row("small", documents=186)], rules).caveats)


def test_a_rule_that_was_chosen_for_the_demo_is_named_for_another_model_while_nobody_changed_it(
    rules: ReportConfig,
) -> None:
    (caveat,) = recommend([row("a")], rules, model="Llama-7B").caveats
    assert caveat.startswith(
        "That the perplexity may grow by 3.00 % is what conf/report comes with, for the demo model"
    )
    assert "what Llama-7B may lose depends on its use" in caveat
    stricter = {name: rule.model_copy(update={"at_most": 2.5}) if name == "quality" else rule
                for name, rule in rules.rules.items()}  # fmt: skip
    own = rules.model_copy(update={"rules": stricter})
    assert recommend([row("a")], own, model="Llama-7B").caveats == recommend([row("a")], rules).caveats == []
