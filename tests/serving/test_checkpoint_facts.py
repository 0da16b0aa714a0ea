from __future__ import annotations

from tiny_quantized import mlp_of, shapes_of

from quantline.checkpoints.quantization_config import LayerSettings, describe
from quantline.serving.checkpoint_facts import facts_of_layers, fused_apart

MAIN = LayerSettings(4, 128, True)
GPTQ = describe("gptq", bits=4, group_size=128, symmetric=True)
LAYER = "model.layers.0."


def facts(shapes=None, own=None, skip=(), config=GPTQ, **options):
    shapes = shapes or shapes_of()
    own = {LAYER + name: settings for name, settings in (own or {}).items()}
    linears = {name: own.get(name, MAIN) for name in shapes if name.removeprefix(LAYER) not in skip}
    return facts_of_layers(config, linears, shapes, **options)


def test_linears_that_are_all_alike_give_one_set_of_facts():
    (found,) = facts()
    assert (found.method, found.bits, found.group_size, found.sym) == ("gptq", 4, 128, True)
    assert (found.widths_divisible_by_32, found.fused, found.head, found.cut) == (True, "alike", "float", "nothing")


def test_each_width_of_a_mixed_checkpoint_has_facts_of_its_own():
    found = facts(own={"mlp.down_proj": LayerSettings(8, 64, True)})
    assert [(one.bits, one.group_size) for one in found] == [(4, 128), (8, 64)]
    assert {one.fused for one in found} == {"alike"}


def test_q_and_k_of_different_bits_or_a_float_gate_are_mixed_and_a_float_down_is_not():
    assert {one.fused for one in facts(own={"self_attn.q_proj": LayerSettings(8, 128, True)})} == {"mixed"}
    assert facts(skip=["mlp.gate_proj"])[0].fused == "mixed"
    assert facts(skip=["mlp.down_proj"])[0].fused == "alike"
    assert facts(skip=["mlp.gate_proj", "mlp.up_proj"])[0].fused == "alike"


def test_what_is_computed_as_one_has_one_width():
    # q, k and v of 64, 16 and 16 are one linear of 96
    shapes = {f"{LAYER}self_attn.{name}_proj": (64, out) for name, out in (("q", 64), ("k", 16), ("v", 16))}
    assert facts(shapes)[0].widths_divisible_by_32
    assert not facts({f"{LAYER}mlp.up_proj": (64, 80)})[0].widths_divisible_by_32


def test_tensor_parallelism_splits_down_along_its_groups_and_up_along_its_outputs():
    shapes = {f"{LAYER}mlp.down_proj": (29568, 8192), f"{LAYER}mlp.up_proj": (8192, 29568)}
    assert facts(shapes, tensor_parallel_size=1)[0].cut == "nothing"
    assert facts(shapes, tensor_parallel_size=2)[0].cut == "groups"  # 231 groups of 128: vllm-project/vllm#21695
    assert facts(shapes, skip=["mlp.down_proj"], tensor_parallel_size=2)[0].cut == "nothing"
    assert facts(shapes, heads=64, tensor_parallel_size=3)[0].cut == "heads"


def test_a_float_model_has_heads_that_can_be_cut():
    (found,) = facts_of_layers(None, {}, shapes_of(), heads=6, tensor_parallel_size=4)
    assert (found.method, found.cut) == ("float", "heads")


def test_a_quantized_head_is_named_by_its_config_or_not():
    shapes = shapes_of(head=True)
    assert facts(shapes)[0].head == "unnamed"
    assert facts(shapes, config={**GPTQ, "lm_head": True})[0].head == "named"
    config = describe("compressed_tensors", bits=4, group_size=128, symmetric=True)
    assert facts(shapes, config=config)[0].head == "unnamed"
    config["config_groups"]["group_0"]["targets"].append("re:.*lm_head")
    assert facts(shapes, config=config)[0].head == "named"
    assert facts(shapes, skip=["lm_head"])[0].head == "float"


def test_experts_are_quantized_or_float():
    assert facts(shapes_of(experts=2))[0].experts == "quantized"
    assert facts(shapes_of(experts=2), skip=mlp_of(2))[0].experts == "float"
    assert facts(shapes_of())[0].experts is None
    assert facts_of_layers(None, {}, shapes_of(experts=2))[0].experts == "float"


def test_parts_of_a_gated_delta_net_are_computed_as_one() -> None:
    """Qwen3.5's names (vLLM 0.32, `packed_modules_mapping`)."""
    names = [f"model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")]
    shapes = dict.fromkeys(names, (128, 64))
    quantized = {name: LayerSettings(4, 64, True) for name in names[:2]}
    assert fused_apart(quantized, shapes) == []
    assert fused_apart({names[0]: quantized[names[0]]}, shapes) == [names[:2]]


def test_blocks_of_rows_are_cut_where_they_hold_two_linears_that_are_computed_as_one() -> None:
    config = describe("compressed_tensors_fp8_block", bits=8, group_size=128, symmetric=True)

    def blocks(**rows):
        shapes = {f"{LAYER}self_attn.{name}_proj": (256, out) for name, out in rows.items()}
        return facts(shapes, config=config)[0].blocks

    assert blocks(q=256, k=128, v=64) == "whole"  # the last one may be cut
    assert blocks(q=192, k=128, v=128) == blocks(q=256, k=64, v=64) == "cut"
    assert blocks(o=200) == "whole"
    assert facts()[0].blocks is None
