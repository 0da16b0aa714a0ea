from __future__ import annotations

from pathlib import Path

import pytest

from quantline.checkpoints.layouts.config_values import bits_and_groups, one_of, stored_bits_and_groups
from quantline.core.errors import CheckpointError

PATH = Path("config.json")


def test_bits_and_groups_are_found_under_the_names_of_autoawqs_first_sections_too():
    assert stored_bits_and_groups({"w_bit": 4, "q_group_size": 128}) == (4, 128)
    assert bits_and_groups(PATH, "awq", {"bits": 4, "group_size": -1}, (4,)) == (4, -1)


@pytest.mark.parametrize(
    "config", [{"group_size": 32}, {"bits": 3, "group_size": 32}, {"bits": 4, "group_size": 0}, {"bits": 4}]
)
def test_bits_and_groups_that_no_weight_has_are_refused(config):
    with pytest.raises(CheckpointError, match=r"config\.json: (bits|group_size) is"):
        bits_and_groups(PATH, "awq", config, (4,))


def test_an_unknown_version_is_refused_as_it_is_written():
    assert one_of(PATH, "awq", "GEMM", {"gemm": "awq_gemm"}) == "awq_gemm"
    with pytest.raises(CheckpointError, match="awq stored as 'GEMV_Fast': supported are gemm"):
        one_of(PATH, "awq", "GEMV_Fast", {"gemm": "awq_gemm"})
