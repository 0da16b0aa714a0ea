from __future__ import annotations

import pytest

from quantline.core.errors import ConfigError
from quantline.pipeline.config import parse


def test_the_gate_is_on_and_limits_can_be_set_one_by_one(composed):
    coverage = parse(composed("coverage.max_output_error.bits4=0.3", "coverage.max_weight_error.bits8=null")).coverage
    assert coverage.enabled
    assert (coverage.max_output_error.bits4, coverage.max_weight_error.bits8) == (0.3, None)
    assert coverage.max_output_error.bits8 < coverage.max_output_error.bits3


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("coverage.few_tokens=stop", "coverage.few_tokens=stop: allowed are warn, fail or ignore"),
        ("coverage.max_output_error.bits4=-1", "coverage.max_output_error.bits4=-1: input should be greater than 0"),
        ("coverage.samples=0", "coverage.samples=0: input should be greater than or equal to 1"),
        ("coverage.levels.high=0.01", r"high \(0.01\) is below moderate \(0.1\)"),
    ],
)
def test_a_fault_names_the_option_and_what_it_takes(composed, override, fault):
    with pytest.raises(ConfigError, match=fault):
        parse(composed(override))
