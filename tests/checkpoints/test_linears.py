from __future__ import annotations

import numpy as np
import pytest
import yaml
from tiny_quantized import write_float

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.linears import (
    inventory,
    lacking_experts,
    linear_shapes,
    modules_left,
    routers,
    select_linears,
)
from quantline.checkpoints.model_config import read_config
from quantline.core.errors import UserError
from quantline.quantization.quantize import check_group_size


@pytest.fixture(scope="module")
def model(root):
    return root / "assets" / "demo" / "model"


def write(folder, **shapes):
    tensors = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def stock(folder, config, **shapes):
    """The inventory of a checkpoint with tensors of these shapes."""
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return inventory(Checkpoint.open(folder), config)


def check(folder, group_size):
    checkpoint = Checkpoint.open(folder)
    check_group_size(linear_shapes(checkpoint, {}), select_linears(checkpoint, {}, bits=4, group_size=group_size))


def test_the_linears_of_a_model_are_those_of_its_layers(model):
    shapes = linear_shapes(Checkpoint.open(model), read_config(model))
    assert len(shapes) == 35
    assert {width for width, _ in shapes.values()} >= {384}
    assert not [name for name in shapes if "embed" in name or "norm" in name or "lm_head" in name]


def test_a_group_size_that_does_not_divide_names_the_layer_and_those_that_do(tmp_path):
    write(tmp_path, up=(16, 192), down=(8, 128))
    with pytest.raises(UserError, match=r"group_size=128: .* 1 linears \(first: model\.layers\.0\.up, 192\)") as caught:
        check(tmp_path, 128)
    assert str(caught.value).endswith("group_size=32 or 64 divides them all")
    check(tmp_path, 64)
    check(tmp_path, -1)


def test_where_no_group_size_divides_a_scale_for_each_channel_is_advised(tmp_path):
    write(tmp_path, up=(16, 100))
    with pytest.raises(UserError, match="try group_size=-1"):
        check(tmp_path, 32)


GRANITE = {
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.block_sparse_moe.router.layer.weight": (8, 64),
    "model.layers.0.block_sparse_moe.input_linear.weight": (8, 128, 64),
    "model.layers.0.block_sparse_moe.output_linear.weight": (8, 64, 64),
    "model.layers.0.input_layernorm.weight": (64,),
}
SKIP = [{"match": "*.input_linear", "skip": True}, {"match": "*.output_linear", "skip": True}]


def test_experts_in_one_tensor_need_a_rule_that_leaves_them_float_and_a_router_is_never_a_linear(tmp_path):
    found = stock(tmp_path, {"num_hidden_layers": 1}, **GRANITE)
    attention = "model.layers.0.self_attn.q_proj"
    assert found.linears == {attention: (64, 64)}
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(UserError) as caught:
        select_linears(checkpoint, {}, bits=4, group_size=32)
    message = str(caught.value)
    assert "2 weights of the decoder layers, 80.5 % of the model, are no linears of their own" in message
    assert "first: model.layers.0.block_sparse_moe.input_linear, 8 x 128 x 64" in message
    advised = yaml.safe_load(message.partition("layers.rules=")[2].partition("'")[0])
    assert advised == SKIP
    assert list(select_linears(checkpoint, {}, bits=4, group_size=32, rules=advised)) == [attention]
    with pytest.raises(UserError, match="1 weights of the decoder layers"):
        select_linears(
            checkpoint, {}, bits=4, group_size=32, rules=[*SKIP[:1], {"match": "*.output_linear", "bits": 8}]
        )


@pytest.mark.parametrize(
    ("stacks", "linear", "rules"),
    [
        (["0.mlp.experts.down_proj"], "0.mlp.down_proj", ["*.experts.down_proj"]),
        (["0.mlp.experts.down_proj"], "0.mlp.shared.experts.down_proj", ["*.mlp.experts.down_proj"]),
        (["0.mlp.experts.up", "0.mlp.experts.down"], "0.shared_expert.down", ["*.up", "*.experts.down"]),
        (["1.mlp.up", "1.mlp.down"], "0.mlp.up", ["*.1.mlp.up", "*.down"]),
    ],
)
def test_the_rules_advised_for_stacks_match_no_linear(tmp_path, stacks, linear, rules):
    names = {f"model.layers.{name}": (4, 64, 64) for name in stacks}
    found = stock(tmp_path, {}, **names, **{f"model.layers.{linear}.weight": (64, 64)})
    advised = yaml.safe_load(str(found.fault([])).partition("layers.rules=")[2].partition("'")[0])
    assert {rule["match"] for rule in advised} == set(rules)
    assert found.fault(advised) is None
    chosen = select_linears(Checkpoint.open(tmp_path), {}, bits=4, group_size=32, rules=advised)
    assert list(chosen) == [f"model.layers.{linear}"]


def test_rules_for_stacks_are_advised_before_those_given_which_may_match_them(tmp_path):
    found = stock(tmp_path, {"num_hidden_layers": 1}, **GRANITE)
    assert "before the rules given" not in str(found.fault([]))
    assert "skip: true}]' before the rules given" in str(found.fault([{"match": "*_linear", "bits": 8}]))


@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.gate_up_proj",
        "ffn.experts.mlp.w1",
        "mlp.shared_experts.up_proj",
        "rel_attn.q",
        "mamba.x_proj_weight",
    ],
)
def test_a_weight_in_another_form_is_never_left_out_in_silence(tmp_path, name):
    for shape in ((64, 64), (4, 64, 64)):
        shapes = {f"model.layers.0.{name}": shape, "model.layers.0.self_attn.q_proj.weight": (64, 64)}
        assert list(stock(tmp_path, {}, **shapes).stacks) == [f"model.layers.0.{name}"]


@pytest.mark.parametrize(
    "name",
    [
        "mlp.gate.weight", "mlp.router.weight", "feed_forward.router.weight", "mlp.gate.wg.weight", "mlp.router.gate.weight",
        "mlp.router.classifier.weight", "mlp.shared_expert_gate.weight", "self_attention.experts.router.layer.weight",
        "mlp.gate.router_mlp.fc1.weight", "self_attn.q_norm.weight", "attn.attention.bias", "mlp.experts.down_proj_bias",
        "mixer.A_log",
    ],
)  # fmt: skip
def test_routers_norms_and_biases_are_exceptions_by_name(tmp_path, name):
    found = stock(tmp_path, {}, **{f"model.layers.0.{name}": (64, 64), "model.layers.0.mlp.up_proj.weight": (64, 64)})
    assert (list(found.linears), found.stacks) == (["model.layers.0.mlp.up_proj"], {})


@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.output_gate", "per_layer_input_gate", "conv.in_proj"])
def test_a_linear_with_a_gate_in_its_name_is_none_the_less_a_linear(tmp_path, name):
    shapes = {f"model.layers.0.{name}.weight": (64, 64), "model.layers.0.conv.conv.weight": (64, 64, 3)}
    found = stock(tmp_path, {}, **shapes)
    assert (list(found.linears), found.stacks) == ([f"model.layers.0.{name}"], {})


@pytest.mark.parametrize("tower", ["vision_tower.encoder.layers", "visual.blocks", "audio_tower.layers", "mtp.layers"])
@pytest.mark.parametrize("language", ["model.language_model.layers", "language_model.model.layers", "model.layers"])
def test_only_the_language_model_is_quantized_and_the_rest_is_named_with_its_share(tmp_path, language, tower):
    shapes = {f"{language}.0.self_attn.q_proj.weight": (64, 64), f"{language}.0.mlp.up_proj.weight": (128, 64)}
    # The tower is larger and has as many layers.
    shapes |= {f"{tower}.0.self_attn.q_proj.weight": (512, 64), "multi_modal_projector.linear_1.weight": (64, 64)}
    found = stock(tmp_path, {"text_config": {"num_hidden_layers": 1}}, **shapes)
    assert set(found.linears) == {f"{language}.0.self_attn.q_proj", f"{language}.0.mlp.up_proj"}
    assert f"{tower.partition('.')[0]} (66.7 %)" in found.note
    assert "multi_modal_projector (8.33 %)" in found.note


def test_layers_of_a_list_beside_the_decoder_that_no_name_explains_are_refused_with_the_rule_that_leaves_them(tmp_path):
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (64, 64) for index in range(2)}
    shapes |= {"model.encoder.layers.0.fc1.weight": (64, 64), "model.vision_tower.layers.0.fc1.weight": (64, 64)}
    config = {"num_hidden_layers": 2}
    found = stock(tmp_path, config, **shapes)
    assert list(found.strangers) == ["model.encoder.layers.0.fc1"]
    rule = {"match": "model.encoder.layers.*", "skip": True}
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(UserError, match=r'first: model\.encoder\.layers\.0\.fc1.*match: "model\.encoder\.layers\.\*"'):
        select_linears(checkpoint, config, bits=4, group_size=32)
    assert list(select_linears(checkpoint, config, bits=4, group_size=32, rules=[rule])) == list(found.linears)


def test_layers_beyond_those_of_the_config_predict_further_tokens_and_are_carried_over(tmp_path):
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (64, 64) for index in range(3)}
    found = stock(tmp_path, {"num_hidden_layers": 2}, **shapes)
    assert list(found.linears) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert list(found.others) == ["model.layers.2"]


@pytest.mark.parametrize(
    ("lists", "depth"),
    [
        (("transformer.layer",), 2), (("rwkv.blocks",), 2), (("transformer.attentions", "transformer.ffns"), 2),
        (("model.H_module.layers", "model.L_module.layers"), None),
    ],
)  # fmt: skip
def test_the_layers_are_found_whatever_their_list_is_called(tmp_path, lists, depth):
    shapes = {f"{one}.{index}.lin.weight": (64, 64) for one in lists for index in range(2)}
    found = stock(tmp_path, {"n_layers": depth}, **shapes, **{"transformer.adapters.0.weight": (64, 64)})
    assert set(found.linears) == {name.removesuffix(".weight") for name in shapes}
    assert list(found.others) == ["transformer.adapters"] or list(found.others) == ["transformer"]


def test_experts_that_are_all_float_are_named_as_the_one_module_that_readers_ask_for():
    experts = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(2)]
    assert modules_left([*experts, "lm_head"], ["model.layers.0.self_attn.q_proj"])[-1] == "model.layers.0.mlp.experts"
    assert modules_left(experts[:1], experts[1:]) == experts[:1]
    assert modules_left(["model.layers.0.mlp.experts.gate_up_proj"], [])[1:] == ["model.layers.0.mlp.experts"]
    assert modules_left(["model.layers.0.block_sparse_moe.input_linear"], [])[1:] == [
        "model.layers.0.block_sparse_moe.experts"
    ]
    assert modules_left(["lm_head"], experts) == ["lm_head"]


def test_what_one_expert_lacks_is_named_and_a_whole_mixture_lacks_nothing():
    mixture = [f"model.layers.{layer}.mlp.experts.{number}.{inside}.weight"
               for layer in range(2) for number in range(3) for inside in ("down_proj", "up_proj")]  # fmt: skip
    assert lacking_experts([*mixture, "model.layers.0.mlp.gate.weight"]) == []
    assert lacking_experts(["model.layers.0.mlp.up_proj.weight"]) == []
    gone = mixture.pop(3)
    assert lacking_experts(mixture) == [gone]


def test_routers_are_found_by_name_and_gates_of_an_mlp_are_none(tmp_path):
    folder = write_float(tmp_path / "model", experts=4)
    found = routers(Checkpoint.open(folder))
    assert found
    assert all(name.endswith(".gate") for name in found)
    assert routers(Checkpoint.open(write_float(tmp_path / "dense"))) == []
