from __future__ import annotations

import pytest

from quantline.core.errors import ConfigError
from quantline.pipeline.config import parse


def test_the_gate_is_on_and_limits_can_be_set_one_by_one(composed):
    found = parse(
        composed("layer_errors.max_output_error.bits4=0.3", "layer_errors.max_weight_error.bits8=null")
    ).layer_errors
    assert found.enabled
    assert (found.max_output_error.bits4, found.max_weight_error.bits8) == (0.3, None)
    assert found.max_output_error.bits8 < found.max_output_error.bits3


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("layer_errors.few_tokens=stop", "layer_errors.few_tokens=stop: allowed are warn, fail or ignore"),
        (
            "layer_errors.max_output_error.bits4=-1",
            "layer_errors.max_output_error.bits4=-1: input should be greater than 0",
        ),
        ("layer_errors.samples=0", "layer_errors.samples=0: input should be greater than or equal to 1"),
        ("layer_errors.levels.high=0.01", r"high \(0.01\) is below moderate \(0.1\)"),
    ],
)
def test_a_fault_names_the_option_and_what_it_takes(composed, override, fault):
    with pytest.raises(ConfigError, match=fault):
        parse(composed(override))
