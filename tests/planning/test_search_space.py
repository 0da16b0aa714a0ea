"""What a search may choose from, on the demo model's headers."""

from __future__ import annotations

import pytest

from quantline.checkpoints.linears import select_linears
from quantline.planning.preflight import check
from quantline.planning.search_space import overrides_of, space
from quantline.planning.spec import Machine, Model, VariantSpec
from quantline.serving.checkpoint_facts import units_of
from quantline.serving.rules import Target

METHODS = {"rtn": {"sym": True}, "awq": {"zero_point": True, "version": "gemm", "clip": True}}


@pytest.fixture(scope="module")
def model(root):
    return Model.open(root / "assets/demo/model", "demo")


def of(model, device, methods=METHODS, **more):
    capability = 90 if device == "cuda" else None
    machine = Machine(
        Target("vllm", "0.32.0", device, compute_capability=capability),
        {"rtn": ["native"], "awq": ["autoawq"], "fp8": ["llmcompressor"]},
    )
    units = units_of(select_linears(model.checkpoint, model.config, bits=4, group_size=128))
    losses = {
        (unit, bits): 4.0**-bits * 2.0**-number for number, unit in enumerate(units) for bits in (2, 3, 4, 8)
    }  # fmt: skip
    found = space(
        VariantSpec("rtn"), model, machine, methods, losses, budgeted=("rtn",), step=1.0, **more
    )  # fmt: skip
    return found, machine


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_candidate_passes_and_has_its_exact_size_and_what_does_not_is_said(model, device):
    found, machine = of(model, device)
    for one in found.candidates:
        plan = check(found.variants[one.name], model, machine)
        assert plan.passes("quantize", "convert", "serve")
        assert one.size == plan.weights.total
    assert {"awq-w2", "awq-w3", "awq-w8"} <= set(found.pruned)
    assert all(found.pruned.values())
    assert ("rtn-w8" in found.variants) == (device == "cuda")
    assert {"awq-w4", "rtn-w4", "rtn-6"} <= set(found.variants)
    assert not any(name.startswith("awq-") and name != "awq-w4" for name in found.variants)


def test_without_a_server_all_widths_are_candidates_and_more_bits_are_predicted_to_lose_less(model):
    found, _ = of(model, "cpu", steps=("quantize", "convert"))
    assert {"rtn-w2", "rtn-w3", "rtn-w4", "rtn-w8"} <= set(found.variants)
    known = {one.name: one for one in found.candidates}
    uniform = [known[f"rtn-w{bits}"] for bits in (2, 3, 4, 8)]
    assert [one.predicted for one in uniform] == sorted((one.predicted for one in uniform), reverse=True)
    assert [one.size for one in uniform] == sorted(one.size for one in uniform)


def test_a_method_that_has_its_bits_by_itself_is_one_candidate_with_the_loss_of_these(model):
    found, _ = of(model, "cuda", methods={"fp8": {"scheme": "dynamic"}})
    (one,) = found.candidates
    assert one.name == "fp8-w8"
    assert one.predicted == pytest.approx(sum(4.0**-8 * 2.0**-number for number in range(20)), rel=1e-3)
    assert found.pruned["fp8-w2"] == "fp8 has 8 bits by itself"


def test_overrides_say_method_bits_and_rules():
    rules = ({"match": "a.b", "bits": 8}, {"match": "c", "skip": True})
    assert overrides_of(VariantSpec("gptq", 4, rules=rules)) == [
        "method=gptq", "bits=4", 'layers.rules=[{match: "a.b", bits: 8}, {match: "c", skip: true}]',
    ]  # fmt: skip
    assert overrides_of(VariantSpec("rtn", 8)) == ["method=rtn", "bits=8"]
