from __future__ import annotations

import pytest
import sections
from pydantic import ValidationError

from quantline.config.evaluate import PROTOCOL_KEYS, USUAL_WINDOW, WINDOW_KEYS, EvaluateConfig
from quantline.config.limits import ALARMS, Alarm, LimitsConfig


def test_every_limit_carries_one_alarm_with_a_value_in_its_message():
    for name, field in LimitsConfig.model_fields.items():
        (alarm,) = (part for part in field.metadata if isinstance(part, Alarm))
        assert alarm is ALARMS[name]
        assert alarm.says.format(value=0.5) != alarm.says


def test_a_protocol_is_the_head_of_the_section_and_windows_are_the_protocol_without_its_name_and_level():
    options = sections.evaluation(path="text.jsonl")
    assert list(options.protocol()) == list(options.model_dump())[: len(PROTOCOL_KEYS)]
    assert list(options.windows()) == list(WINDOW_KEYS)
    assert set(PROTOCOL_KEYS) - set(WINDOW_KEYS) == {"name", "level"}


def test_the_schema_names_what_fail_on_takes():
    schema = EvaluateConfig.model_json_schema()["properties"]["fail_on"]
    assert schema["items"]["enum"] == list(ALARMS)


def test_a_window_and_a_stride_that_follow_are_numbers_in_the_identity():
    options = sections.evaluation(path="text.jsonl", window="auto", stride="auto")
    assert (options.windows()["window"], options.protocol()["stride"]) == (USUAL_WINDOW, USUAL_WINDOW)
    with pytest.raises(ValidationError, match="give 1 to 512"):
        sections.protocol(window="auto", stride=600)


@pytest.mark.parametrize(("window", "stride"), [(4, 5), (4, 0), (1, 1)])
def test_windows_that_leave_text_out_or_predict_nothing_are_refused(window, stride):
    with pytest.raises(ValidationError):
        sections.protocol(window=window, stride=stride)
