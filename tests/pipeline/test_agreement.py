"""What a variant shares with the float baseline; tests with lines of params.yaml are in test_compose.py."""

from __future__ import annotations

import pytest

from quantline.core.errors import ConfigError
from quantline.pipeline.agreement import refuse_contradictions
from quantline.pipeline.config import parse

FLOAT = {"shared": ["model=demo"], "baseline": ["method=float"]}


@pytest.fixture
def refuse(composed):
    def of(*own, shared=("model=demo",)):
        lines = {"shared": list(shared), "variants.one": list(own)}
        config = parse(composed(*shared, *own))
        refuse_contradictions(config, lines, {**FLOAT, "shared": list(shared)}, lambda one: parse(composed(*one)))

    return of


def test_every_contradiction_is_told_at_once(refuse):
    with pytest.raises(ConfigError) as caught:
        refuse("model.path=B", "evaluate.window=256", "tasks.seed=3", "bits=8", "method=gptq")
    assert [fault.split()[1] for fault in caught.value.faults] == [
        "model.path=B",
        "evaluate.window=256",
        "tasks.seed=3",
    ]


def test_a_variant_without_tasks_contradicts_none(refuse):
    refuse("tasks=none", "tasks.seed=3", "serve.max_model_len=2048")
    with pytest.raises(ConfigError, match=r"serve\.max_model_len=2048 contradicts"):
        refuse("serve.max_model_len=2048")
