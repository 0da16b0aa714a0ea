"""Plans by budget on the demo model's headers: they pass the preflight, and keep fused linears alike."""

from __future__ import annotations

import pytest

from quantline.checkpoints.linears import select_linears
from quantline.core.errors import UserError
from quantline.planning.budget import Limit, budget, patterns
from quantline.planning.preflight import check
from quantline.planning.spec import Machine, Model, VariantSpec
from quantline.serving.checkpoint_facts import units_of
from quantline.serving.rules import Target

GPTQ = {"damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True, "static_groups": False}


@pytest.fixture(scope="module")
def model(root):
    return Model.open(root / "assets/demo/model", "demo")


def machine(device="cuda"):
    target = Target("vllm", "0.32.0", device, compute_capability=90 if device == "cuda" else None)
    return Machine(target, {"gptq": ["auto_gptq", "gptqmodel"], "rtn": ["native"]})


def losses_of(model, sharp=4.0):
    """Earlier layers lose more, in proportion to `sharp` to their number."""
    linears = select_linears(model.checkpoint, model.config, bits=4, group_size=128)
    return {
        (unit, bits): sharp ** -index * 4.0**-bits
        for index, unit in enumerate(units_of(linears)) for bits in (2, 3, 4, 8)
    }  # fmt: skip


def test_fused_linears_are_one_unit_and_all_experts_of_a_layer(model):
    units = units_of(select_linears(model.checkpoint, model.config, bits=4, group_size=128))
    assert sorted(units["model.layers.0.self_attn.q_proj+k_proj+v_proj"]) == [
        f"model.layers.0.self_attn.{part}_proj" for part in "kqv"
    ]
    names = [
        f"model.layers.1.mlp.experts.{number}.{part}_proj" for number in range(3) for part in ("gate", "up", "down")
    ]
    assert units_of(names) == {"model.layers.1.mlp.experts.*": names}
    assert patterns("a.q_proj+k_proj") == ["a.q_proj", "a.k_proj"]
    assert units_of(["lm_head"]) == {"lm_head": ["lm_head"]}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [4.6, 6.0])
def test_a_plan_is_an_ordinary_variant_that_passes_within_its_size(model, method, bits):
    variant = VariantSpec(method, options=GPTQ if method == "gptq" else {"sym": True})
    found = budget(variant, model, machine(), losses_of(model), Limit(bits=bits))
    assert {4, 8, 16} <= set(found.widths)
    assert found.taken == "mixed"
    assert found.bits <= bits
    assert found.uniform is not None
    assert found.allocation.loss < found.uniform.loss
    plan = check(found.variant, model, machine())
    assert not plan.refused
    assert plan.weights.total == pytest.approx(found.allocation.size, rel=0.02)


def test_on_a_cpu_where_only_4_bits_are_served_the_others_stay_float(model):
    found = budget(VariantSpec("gptq", options=GPTQ), model, machine("cpu"), losses_of(model), Limit(bits=6))
    assert found.widths == (4, 16)
    assert all(rule.get("skip") for rule in found.variant.rules)


def test_a_loss_as_the_limit_gives_the_smallest_plan(model):
    losses = losses_of(model)
    loose, tight = (
        budget(VariantSpec("gptq", options=GPTQ), model, machine(), losses, Limit(loss=loss)) for loss in (3e-3, 3e-5)
    )
    assert loose.allocation.size < tight.allocation.size
    assert tight.allocation.loss <= 3e-5


def test_where_all_units_are_alike_one_width_is_taken_and_said(model):
    alike = {key: 4.0 ** -key[1] for key in losses_of(model)}
    found = budget(VariantSpec("gptq", options=GPTQ), model, machine(), alike, Limit(bits=4.35))
    assert (found.taken, found.allocation.uniform, found.variant.rules) == ("uniform", 4, ())


def test_what_no_plan_meets_or_nothing_measured_is_refused(model):
    variant = VariantSpec("gptq", options=GPTQ)
    with pytest.raises(UserError, match="no plan is as small as"):
        budget(variant, model, machine(), losses_of(model), Limit(bits=1.5))
    with pytest.raises(UserError, match="leaves every linear in float"):
        budget(variant, model, machine(), losses_of(model), Limit(loss=1e-30))
    few = {key: value for key, value in losses_of(model).items() if key[1] == 2}
    with pytest.raises(UserError, match="none of the widths 2 works"):
        budget(variant, model, machine("cpu"), few, Limit(bits=4))
