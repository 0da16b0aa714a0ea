from __future__ import annotations

import json
from dataclasses import replace

import pytest
from places import CPU, GPU, HERE, ORDER, THERE
from tiny_quantized import write_float

from quantline.core.errors import UserError
from quantline.pipeline.preflight import before_quantize, method_defaults
from quantline.planning.preflight import check
from quantline.planning.report import as_text, sizes
from quantline.planning.spec import Machine, Model, RefusedError, VariantSpec
from quantline.serving.memory import GIB, Limits
from quantline.serving.rules import Target


@pytest.fixture
def checked(variant, model):
    return lambda method, changes, place: check(variant(method, **changes), model, place)


def against(plan):
    return [(finding.step, finding.id) for finding in plan.refused]


def test_a_good_variant_has_nothing_against_it_and_its_sizes(variant, model):
    plan = check(variant("awq"), model, HERE)
    assert (plan.backend, plan.layout, plan.findings) == ("autoawq", "awq_gemm", ())
    assert plan.weights.total < plan.weights.float_source
    assert plan.kv_bytes == 4096 * plan.kv.bytes_per_token
    assert plan.peak.total > plan.peak.model > 0


@pytest.mark.parametrize(
    ("method", "changes", "where", "expected"),
    [
        ("gptq", {"bits": 8}, HERE, [("serve", "gptq-cpu-bits")]),
        ("gptq", {"bits": 8}, THERE, []),
        ("gptq", {"sym": False}, THERE, []),  # as compressed-tensors
        ("gptq", {"sym": False, "convert": "keep"}, THERE, [("serve", "gptq-asymmetric")]),
        ("gptq", {"bits": 3}, THERE, []),
        ("gptq", {"bits": 3}, HERE, [("serve", "compressed-tensors-cpu-bits")]),
        ("gptq", {"desc_act": True}, THERE, [("serve", "gptq-grouped-desc-act")]),
        ("gptq", {"desc_act": True, "group_size": -1}, THERE, []),
        ("gptq", {"group_size": 256}, THERE, []),
        ("gptq", {"group_size": 256, "convert": "keep"}, THERE, [("serve", "gptq-group-size")]),
        ("gptq", {"serve_dtype": "float32"}, HERE, [("serve", "quantized-float32")]),
        ("gptq", {"group_size": 1024}, HERE, [("quantize", "group-size")]),
        ("gptq", {"backend": "autoawq"}, HERE, [("quantize", "backend")]),
        ("gptq", {"rules": ({"match": "*.q_proj", "skip": True},)}, HERE, [("serve", "fused-layers-differ")]),
        ("gptq", {"rules": ({"match": "*.down_proj", "skip": True},)}, HERE, []),
        ("gptq", {"rules": ({"match": "*.nothing", "skip": True},)}, HERE, [("quantize", "layers")]),
        ("rtn", {"rules": ({"match": "*.mlp.*", "bits": 8},)}, HERE, [("serve", "gptq-cpu-bits")]),
        ("rtn", {"rules": ({"match": "*.mlp.*", "bits": 8},)}, THERE, []),
        ("rtn", {"lm_head": True}, THERE, [("quantize", "layers")]),
        ("rtn", {"bits": 8, "convert": "awq"}, THERE, [("convert", "layout")]),
        ("rtn", {"bits": 8, "convert": "compressed_tensors"}, HERE, [("serve", "compressed-tensors-cpu-bits")]),
        ("awq", {"version": "gemv"}, HERE, []),
        ("awq", {"version": "gemv", "convert": "keep"}, HERE, [("serve", "awq-layout")]),
        ("awq", {"zero_point": False}, HERE, []),
        ("awq", {"tensor_parallel_size": 3}, THERE, [("serve", "tensor-parallel-heads")]),
        ("awq", {"group_size": 256, "tensor_parallel_size": 2}, THERE, [("serve", "tensor-parallel-groups")]),
        ("awq", {"serve_dtype": "bfloat16"}, Machine(Target("vllm", "0.32.0", "cuda", compute_capability=75), ORDER),
         [("serve", "gpu-bfloat16")]),
        ("awq", {}, Machine(Target("vllm", "0.32.0", "cuda", compute_capability=70), ORDER), [("serve", "gpu-capability")]),
        ("awq", {}, Machine(Target("vllm", "0.32.0", "cpu", instructions="avx2"), ORDER),
         [("serve", "cpu-int4-needs-avx512")]),
        ("awq", {}, Machine(CPU, ORDER, memory_bytes=2**20), [("memory", "memory")]),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(checked, method, changes, where, expected):
    assert against(checked(method, changes, where)) == expected


def test_before_quantizing_what_the_server_refuses_is_a_note_unless_it_must_serve(variant, model, defaults):
    eight = variant("gptq", 8)
    (note,) = before_quantize(eight, model, HERE, must_serve=False, defaults=defaults)
    assert "GPTQ with 4 bits only" in note
    with pytest.raises(RefusedError, match="the nearest that works: method=gptq bits=4 group_size=128") as caught:
        before_quantize(eight, model, HERE, must_serve=True, defaults=defaults)
    assert caught.value.exit_code == 2
    with pytest.raises(RefusedError, match="does not divide the in-features"):
        before_quantize(variant("gptq", 4, 1024), model, HERE, must_serve=False, defaults=defaults)


def test_a_quantized_model_is_refused_as_a_source(tmp_path):
    folder = write_float(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantized already"):
        Model.open(folder)


def test_a_number_in_quotes_is_refused_by_its_key(tmp_path):
    folder = write_float(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": "6"}))
    with pytest.raises(UserError, match=rf'^{folder}: config\.json has num_attention_heads="6"'):
        Model.open(folder)


def test_gpus_share_weights_and_cache_and_copy_what_heads_cannot_be_shared(variant, model):
    one, two, four = (check(variant("awq", tensor_parallel_size=size), model, THERE) for size in (1, 2, 4))
    assert one.serving_bytes() == one.weights.total + one.kv_bytes + one.overhead_bytes
    assert two.serving_bytes() - two.overhead_bytes == -(-one.weights.total // 2) + one.kv_bytes // 2
    assert four.serving_bytes() - four.overhead_bytes == -(-one.weights.total // 4) + one.kv_bytes // 2  # 2 such heads


def test_a_server_that_is_given_too_small_a_share_is_told_which_would_do(variant, model):
    given = Machine(GPU, ORDER, memory_bytes=2 * GIB, utilization=0.25)
    (note,) = check(variant("awq"), model, given).findings
    assert (note.id, note.refused) == ("memory-share", False)
    share = float(note.remedy.partition("gpu_memory_utilization=")[2].split()[0])
    assert check(variant("awq"), model, replace(given, utilization=share)).findings == ()


def test_quantized_experts_are_not_served_on_a_cpu_without_amx_and_float_ones_are(variant, tmp_path):
    folder = write_float(tmp_path / "model", experts=4)
    mixture, here = Model.open(folder), replace(HERE, target=replace(CPU, amx=False))
    assert against(check(variant("rtn"), mixture, here)) == [("serve", "cpu-experts")]
    assert against(check(variant("rtn"), mixture, replace(HERE, target=replace(CPU, amx=True)))) == []
    skipped = variant("rtn", rules=({"match": "*.experts.*", "skip": True},))
    assert against(check(skipped, mixture, here)) == []


def test_what_the_server_has_no_class_for_is_not_planned_as_served(variant, model):
    rwkv = replace(model, config={**model.config, "architectures": ["RwkvForCausalLM"]})
    assert against(check(variant("rtn"), rwkv, HERE)) == [("serve", "architecture")]
    other = replace(model, config={**model.config, "architectures": ["HeliumForCausalLM"]})
    plan = check(variant("rtn"), other, HERE)
    assert plan.passes()
    assert [finding.id for finding in plan.findings] == ["architecture"]


def test_memory_that_a_config_does_not_give_is_unknown_and_no_reason_against_it(variant, model):
    headless = replace(model, config={"model_type": "mamba", "hidden_size": 64, "vocab_size": 9})
    plan = check(variant("rtn"), headless, replace(HERE, memory_bytes=GIB))
    assert (plan.passes(), plan.kv, plan.serving_bytes()) == (True, None, None)
    assert [finding.id for finding in plan.findings] == ["memory-unknown"]
    text = as_text(plan, headless, replace(HERE, memory_bytes=GIB), None, None)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("needed")] == ["unknown"]
    assert sizes(plan, HERE)["kv_cache"] is None


def test_quantizing_beyond_the_memory_is_a_note(variant, model):
    (note,) = check(variant("awq"), model, replace(HERE, quantizer_bytes=2**20)).findings
    assert (note.id, note.step, note.refused) == ("quantization-memory", "quantize", False)


def test_weights_in_main_memory_are_not_on_the_gpu_and_embeddings_never_leave_it(variant, model):
    usual = check(variant("awq"), model, THERE)
    some = check(variant("awq"), model, replace(THERE, limits=Limits(offloaded=1000, kv_offloaded=500)))
    assert some.serving_bytes() == usual.serving_bytes() - 1000
    assert sizes(some, replace(THERE, limits=Limits(offloaded=1000, kv_offloaded=500)))["main_memory"] == 1500
    everything = check(variant("awq"), model, replace(THERE, limits=Limits(offloaded=GIB)))
    left = usual.weights.total - everything.offloaded_bytes
    tables = sum(model.checkpoint.info(name).shape[0] * model.checkpoint.info(name).shape[1] * 2
                 for name in model.checkpoint.names if "embed" in name or "lm_head" in name)  # fmt: skip
    assert 0 < left <= tables
    halves = check(variant("awq", tensor_parallel_size=2), model, replace(THERE, limits=Limits(offloaded=1000)))
    assert halves.offloaded_bytes == 1000  # of each GPU
    assert check(variant("awq"), model, replace(HERE, limits=Limits(offloaded=1000))).offloaded_bytes == 0


def test_the_cache_has_whole_blocks_of_the_sequences_that_are_computed_at_a_time(variant, model):
    place = replace(THERE, context=100, batch=8)
    usual = check(variant("awq"), model, place)
    few = check(variant("awq"), model, replace(place, limits=Limits(max_num_seqs=2, block_size=64)))
    assert (usual.kv_bytes, few.kv_bytes) == (800 * usual.kv.bytes_per_token, 256 * usual.kv.bytes_per_token)
    more = check(variant("awq"), model, replace(place, limits=Limits(batched_tokens=100_000)))
    assert more.overhead_bytes > usual.overhead_bytes > few.overhead_bytes
    assert "2 x 128 tokens" in as_text(
        few, model, replace(place, limits=Limits(max_num_seqs=2, block_size=64)), None, None
    )


def test_a_plan_names_no_groups_where_a_width_has_none(root, model):
    place = replace(HERE, order={"bnb": ("bitsandbytes",)})

    def shown(bits):
        asked = VariantSpec("bnb", bits, 64, method_defaults(root)["bnb"])
        return as_text(check(asked, model, place), model, place, None, None).splitlines()[1]

    assert shown(8) == "variant bnb 8 bits, one scale a row, by bitsandbytes"
    assert "groups of" in shown(4)
