from __future__ import annotations

from places import CPU, GPU, ORDER
from tiny_quantized import write_float

from quantline.planning.recommend import candidates, suggest
from quantline.planning.spec import Machine, Model, VariantSpec
from quantline.serving.memory import GIB
from quantline.serving.rules import Target


def best(model, place, defaults, *, critical=False, **asked):
    return suggest(
        VariantSpec("awq", options=defaults["awq"], **asked), model, place, critical=critical, defaults=defaults
    )


def test_critical_use_on_a_gpu_gets_8_bits_and_other_use_4(model, defaults):
    roomy = Machine(GPU, ORDER, memory_bytes=24 * GIB)
    assert best(model, roomy, defaults, critical=True).best.overrides == "method=gptq bits=8 group_size=128"
    assert best(model, roomy, defaults).best.overrides == "method=awq bits=4 group_size=128"


def test_where_8_bits_do_not_serve_critical_use_stays_float(model, defaults):
    found = best(model, Machine(CPU, ORDER, memory_bytes=24 * GIB), defaults, critical=True)
    assert found.best.overrides == "method=float"
    assert all(choice.tier != 1 or not choice.works for choice in found.choices)


def test_groups_are_made_smaller_where_gpus_would_cut_them(untied, tmp_path, defaults):
    odd = Model.open(write_float(tmp_path / "odd", inner=384), "odd")
    found = best(odd, Machine(GPU, ORDER, memory_bytes=24 * GIB), defaults, critical=True, tensor_parallel_size=2)
    assert found.best.overrides == "method=gptq bits=8 group_size=64"


def test_where_nothing_fits_nothing_is_recommended_and_each_says_why(model, defaults):
    found = best(model, Machine(GPU, ORDER, memory_bytes=2**20), defaults, critical=True)
    assert found.best is None
    assert all(choice.against for choice in found.choices)


def test_critical_use_never_gets_less_than_4_bits(model, defaults):
    # A server that takes everything, by a version without rules.
    found = best(model, Machine(Target("vllm", "9.0", "cpu"), ORDER), defaults, critical=True)
    assert [choice.tier for choice in found.choices if choice.works][:1] == [1]
    assert not any(choice.tier > 2 for choice in found.choices[:3])


def test_what_was_measured_is_told_before_what_was_published(model, defaults):
    place, known = (
        Machine(GPU, ORDER, memory_bytes=24 * GIB),
        {("gptq", 8, 128): "measured here: perplexity +0.10 % (x)"},
    )
    asked = VariantSpec("awq", options=defaults["awq"])
    found = suggest(asked, model, place, critical=True, defaults=defaults, measured=known)
    assert found.best.measured == known["gptq", 8, 128]


def test_every_candidate_has_a_tier_and_says_what_is_known_of_its_loss():
    assert {entry["tier"] for entry in candidates()} == set(range(5))
    assert all(entry["loss"] for entry in candidates())
