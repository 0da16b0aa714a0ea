from __future__ import annotations

import pytest

from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers.selection import chosen, chosen_in, file_name, width_of

JOB = {"bits": 4, "group_size": 128, "linears": {"m.a": {"bits": 8, "group_size": -1}, "m.b": None}}


def test_a_linear_has_its_own_width_or_the_jobs():
    assert width_of(JOB, "m.a") == (8, -1)
    assert width_of(JOB, "m.b") == width_of(JOB, "m.c") == width_of({**JOB, "linears": None}, "m.a") == (4, 128)


def test_the_linears_that_the_job_names_are_chosen_and_all_where_it_names_none():
    found = {"m.a": 1, "m.b": 2, "m.c": 3}
    assert chosen(JOB, found) == {"m.a": 1, "m.b": 2}
    assert chosen({}, found) == found
    assert chosen_in(JOB, "m", {"a": 1, "c": 3}) == {"a": 1}
    assert chosen_in({}, "m", {"a": 1, "c": 3}) == {"a": 1, "c": 3}


def test_a_linear_that_the_library_does_not_quantize_is_refused():
    with pytest.raises(JobError, match=r"m\.b and 0 other linears of this model"):
        chosen(JOB, {"m.a": 1})


def test_mixtrals_experts_have_other_names_in_its_files():
    name = "model.layers.0.mlp.experts.3.gate_proj"
    assert file_name(name, "mixtral") == "model.layers.0.block_sparse_moe.experts.3.w1"
    assert file_name(name, "qwen2_moe") == name
    assert file_name("model.layers.0.self_attn.q_proj", "mixtral") == "model.layers.0.self_attn.q_proj"
