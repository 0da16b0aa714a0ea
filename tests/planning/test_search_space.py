"""What a search may choose from, on the demo model's headers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantline.checkpoints.linears import select_linears
from quantline.planning.budget import SERVED
from quantline.planning.preflight import check
from quantline.planning.search_space import Axes, overrides_of, space
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
        {"rtn": ["native"], "awq": ["autoawq"], "fp8": ["llmcompressor"], "gguf": ["llamacpp"]},
        versions={"llamacpp": "2026.10.11549"},
    )
    units = units_of(select_linears(model.checkpoint, model.config, bits=4, group_size=128))
    losses = {
        (unit, bits): 4.0**-bits * 2.0**-number for number, unit in enumerate(units) for bits in (2, 3, 4, 8)
    }  # fmt: skip
    groups = more.pop("groups", (128,))
    axes = Axes(
        methods, dict.fromkeys(groups, losses), more.pop("caches", {"auto": machine}), ("rtn",), 1.0,
        named_groups=len(groups) > 1, **more,
    )  # fmt: skip
    return space(VariantSpec("rtn"), model, axes), machine


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


def test_each_group_size_has_its_candidates_and_its_own_sizes(model):
    found, _ = of(model, "cpu", groups=(64, 128), methods={**METHODS, "fp8": {"scheme": "dynamic"}})
    known = {one.name: one for one in found.candidates}
    assert {"rtn-w4-g64", "rtn-w4-g128", "awq-w4-g64", "rtn-6-g64", "fp8-w8"} <= set(known)
    assert known["rtn-w4-g64"].size > known["rtn-w4-g128"].size
    assert "group_size=64" in known["rtn-w4-g64"].overrides
    assert not any("group_size" in one for one in known["fp8-w8"].overrides)
    assert len([name for name in known if name.startswith("fp8")]) == 1


def test_a_smaller_cache_is_taken_only_where_the_usual_one_does_not_fit(model):
    _, machine = of(model, "cpu")
    plain, small = (
        replace(machine, batch=64, memory_bytes=2**33, target=replace(machine.target, kv_cache_dtype=kind))
        for kind in (None, "fp8")
    )
    needs = [check(VariantSpec("rtn"), model, one).serving_bytes() for one in (plain, small)]
    assert needs[1] < needs[0]
    for room, expected in ((needs[0], "rtn-w4"), (needs[1], "rtn-w4-kv-fp8"), (needs[1] - 1, None)):
        given = {"auto": replace(plain, memory_bytes=room), "fp8": replace(small, memory_bytes=room)}
        found, _ = of(model, "cpu", caches=given, methods={"rtn": METHODS["rtn"]}, steps=(*SERVED, "memory"))
        names = [one.name for one in found.candidates if one.name.startswith("rtn-w4")]
        assert names == ([expected] if expected else [])
        if expected == "rtn-w4":
            assert found.pruned["rtn-w4-kv-fp8"] == "rtn-w4 fits with the KV cache that is tried before it"
        else:
            assert "is available" in found.pruned["rtn-w4"]
    assert "is available" in found.pruned["rtn-w4-kv-fp8"]


def test_a_cache_that_the_server_does_not_take_is_pruned_by_the_rules(model):
    _, machine = of(model, "cpu")
    other = replace(machine, target=replace(machine.target, kv_cache_dtype="int8_per_token_head"))
    found, _ = of(model, "cpu", caches={"int8_per_token_head": other}, methods={"rtn": METHODS["rtn"]})
    assert found.candidates == []
    assert "computes attention wrongly" in found.pruned["rtn-w4"]


def test_gguf_has_types_whose_loss_follows_their_real_bits(model):
    kinds = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K", "IQ2_M")
    methods = {"gguf": {"type": "Q4_K_M", "imatrix": False}}
    found, _ = of(model, "cpu", methods=methods, types=kinds)
    known = {one.name: one for one in found.candidates}
    assert list(known) == ["gguf-Q8_0", "gguf-Q5_K_M", "gguf-Q4_K_M", "gguf-Q2_K"]
    assert known["gguf-Q4_K_M"].overrides == ("method=gguf", "method.type=Q4_K_M")
    losses = [one.predicted for one in sorted(known.values(), key=lambda one: one.size)]
    assert losses == sorted(losses, reverse=True)
    assert "importance matrix" in found.pruned["gguf-IQ2_M"]
