"""Plan knows a GGUF variant from headers: real types, the exact size, its server, and what is refused."""

from __future__ import annotations

import pytest

from quantline.planning.nearest import nearest
from quantline.planning.preflight import check
from quantline.planning.spec import Machine, Model, VariantSpec
from quantline.serving.rules import Target

ORDER = {"gguf": ["llamacpp"], "rtn": ["native"]}
MACHINE = Machine(
    Target("vllm", "0.32.0", "cpu", instructions="avx2", amx=False), ORDER, versions={"llamacpp": "2026.10.11549"}
)


def spec(kind: str = "Q4_K_M", **changes):
    options = {"type": kind, "imatrix": changes.pop("imatrix", True)}
    return VariantSpec("gguf", options=options, **changes)


@pytest.fixture(scope="module")
def demo(root):
    return Model.open(root / "assets/demo/model", "demo")


def test_the_size_is_that_of_the_file_and_the_types_are_told(demo):
    plan = check(spec(), demo, MACHINE)
    assert plan.passes()
    assert (plan.layout, plan.backend) == ("gguf", "llamacpp")
    assert plan.weights.total == 7_101_440  # as llama.cpp itself says of this model
    (note,) = [finding for finding in plan.findings if finding.id == "types"]
    assert note.reason.startswith("Q4_K_M is 28 x Q5_0")


def test_it_is_served_on_a_cpu_where_vllm_has_no_kernels_of_four_bits(demo):
    assert check(spec(), demo, MACHINE).passes("serve")


@pytest.mark.parametrize(
    ("variant", "words"),
    [(spec("IQ2_M", imatrix=False), "garbage without an importance matrix"),
     (spec(rules=({"match": "*.down_proj", "skip": True},)), "llamacpp has no rules by layer"),
     (spec(lm_head=True), "lm_head=quantized: llamacpp leaves it float")],
)  # fmt: skip
def test_what_the_mixtures_do_not_do_is_refused_before_compute(demo, variant, words):
    plan = check(variant, demo, MACHINE)
    assert not plan.passes("quantize")
    assert any(words in finding.reason for finding in plan.refused)


def test_a_type_that_needs_an_importance_matrix_is_offered_with_it(demo):
    defaults = {"gguf": {"type": "Q4_K_M", "imatrix": True}}
    assert nearest(spec("IQ2_M", imatrix=False), demo, MACHINE, defaults) == "method=gguf method.type=IQ2_M"
