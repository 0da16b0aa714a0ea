"""What conversion tells a server: the output layer in the config; and what it says of servers before anything is written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantline.checkpoints.layouts import quantize_rtn
from quantline.checkpoints.layouts.msmodelslim.files import write_files
from quantline.checkpoints.quantization_config import quantization_of
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.conversion.errors import ConversionError
from quantline.serving.rules import Target
from tests.conversion.test_convert import format_of

LAYER = "model.layers.0."
VLLM = Target("vllm", "0.32.0", "cpu")
HEAD = "lm_head"


def source(folder, kinds, rest=()):
    """A checkpoint of msModelSlim's; kinds: name -> (bits, group size)."""
    folder.mkdir()
    random = np.random.default_rng(0)
    linears = {
        name: quantize_rtn(random.normal(size=(64, 64)).astype(np.float32), bits, size, True)
        for name, (bits, size) in kinds.items()
    }
    floats = {f"{name}.weight": np.ones((64, 64), np.float16) for name in rest}
    write_files(folder, linears, {"model.norm.weight": np.ones(64, np.float16), **floats})
    (folder / "config.json").write_text('{"model_type": "qwen2", "num_attention_heads": 4}')
    return folder


def run(tmp_path, folder, target, serving=None, **options):
    out = tmp_path / target
    out.mkdir()
    return convert(folder, out, ConvertConfig(target=target, **options), serving=serving), out


def attention(**own):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {f"{LAYER}self_attn.{name}": own.get(name, (4, 32)) for name in names}


@pytest.mark.parametrize("target", ["awq", "gptq", "gptq_v2", "compressed_tensors"])
def test_a_quantized_output_layer_is_named_in_the_config(tmp_path, target):
    folder = source(tmp_path / "in", {f"{LAYER}mlp.down_proj": (4, 32), HEAD: (4, 32)}, rest=[f"{LAYER}mlp.other"])
    proof, out = run(tmp_path, folder, target, serving=VLLM, must_serve="vllm")
    said = format_of(out)
    assert HEAD not in (said.get("modules_to_not_convert") or said.get("ignore"))
    if target == "compressed_tensors":
        assert said["config_groups"]["group_0"]["targets"] == ["Linear", HEAD]
    else:
        assert said["lm_head"] is True
    assert proof.counts["linears"] == 2
    assert quantization_of(out).of(HEAD).bits == 4


@pytest.mark.parametrize("target", ["awq", "gptq", "compressed_tensors"])
def test_a_float_output_layer_is_named_as_such(tmp_path, target):
    folder = source(tmp_path / "in", {f"{LAYER}mlp.down_proj": (4, 32)}, rest=[HEAD])
    said = format_of(run(tmp_path, folder, target)[1])
    assert (said.get("modules_to_not_convert") or said.get("ignore")) == [HEAD]
    assert not said.get(HEAD)


def test_an_output_layer_of_other_bits_is_a_target_of_its_own(tmp_path):
    folder = source(tmp_path / "in", {**attention(), HEAD: (8, -1)})
    _, out = run(tmp_path, folder, "compressed_tensors")
    groups = format_of(out)["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"], [HEAD]]
    assert (quantization_of(out).of(HEAD).bits, quantization_of(out).of(HEAD).group_size) == (8, -1)


def test_an_output_layer_tied_to_the_embeddings_is_left_out_of_linear(tmp_path):
    """transformers would pack it, and then finds no weight of it to load."""
    _, out = run(tmp_path, source(tmp_path / "in", attention()), "compressed_tensors")
    assert format_of(out)["ignore"] == [HEAD]


@pytest.mark.parametrize(
    ("kinds", "rest", "named"),
    [
        (attention(k_proj=(4, 64)), [], "self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v"),
        (attention(v_proj=(8, 32)), [], "self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v"),
        ({**attention(), f"{LAYER}mlp.gate_proj": (4, 32)}, [f"{LAYER}mlp.up_proj"],
         "mlp.gate_proj, model.layers.0.mlp.up_proj"),
    ],
)  # fmt: skip
def test_parts_of_one_linear_that_differ_are_named_in_a_note_or_on_request_an_error(tmp_path, kinds, rest, named):
    folder = source(tmp_path / "in", kinds, rest)
    proof, _ = run(tmp_path, folder, "compressed_tensors", serving=VLLM)
    (note,) = [note for note in proof.warnings if "as one linear" in note]
    assert note.startswith("vllm 0.32.0 on cpu will not serve it: ")
    assert f"({LAYER}{named}" in note
    refused = tmp_path / "refused"
    refused.mkdir()
    with pytest.raises(ConversionError, match=r"convert\.for=vllm: vllm 0\.32\.0 on cpu .* as one linear"):
        convert(folder, refused, ConvertConfig(target="compressed_tensors", must_serve="vllm"), serving=VLLM)
    assert list(refused.iterdir()) == []


def test_layers_that_are_quantized_or_float_as_a_whole_are_fine(tmp_path):
    kinds = {**attention(o_proj=(4, 64)), f"{LAYER}mlp.down_proj": (4, 16)}
    rest = [f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj"]
    proof, _ = run(
        tmp_path, source(tmp_path / "in", kinds, rest), "compressed_tensors", serving=VLLM, must_serve="vllm"
    )
    assert proof.warnings == []


def test_a_kept_checkpoint_is_told_the_same(tmp_path):
    folder = source(tmp_path / "in", attention(k_proj=(4, 64)))
    _, out = run(tmp_path, folder, "compressed_tensors")
    (tmp_path / "again").mkdir()
    proof = convert(out, tmp_path / "again", ConvertConfig(target="keep"), serving=VLLM)
    assert not proof.rewritten
    assert any("as one linear" in note for note in proof.warnings)
    with pytest.raises(ConversionError, match="as one linear"):
        convert(out, tmp_path / "again", ConvertConfig(target="keep", must_serve="vllm"), serving=VLLM)


def test_many_parts_that_differ_are_named_up_to_eight(tmp_path):
    kinds = {
        name.replace("layers.0", f"layers.{index}"): kind
        for index in range(4) for name, kind in attention(k_proj=(4, 64)).items()
    }  # fmt: skip
    proof, _ = run(tmp_path, source(tmp_path / "in", kinds), "compressed_tensors", serving=VLLM)
    (note,) = [note for note in proof.warnings if "as one linear" in note]
    assert "and 4 more)" in note


def test_float32_scales_are_kept_exactly_and_a_server_that_rounds_them_is_named(tmp_path):
    folder = source(tmp_path / "in", attention())
    weights = next(folder.glob("*.safetensors"))
    from safetensors.numpy import load_file, save_file

    tensors = load_file(weights)
    wide = {
        name: value.astype(np.float32) * (np.float32(1.0001) if name.endswith("weight_scale") else 1)
        for name, value in tensors.items() if name.endswith(("weight_scale", "weight_offset"))
    }  # fmt: skip
    save_file({**tensors, **wide}, weights)
    proof, out = run(tmp_path, folder, "compressed_tensors", serving=VLLM, must_serve="vllm")
    assert proof.warnings == [
        "vllm 0.32.0 on cpu rounds scales to the dtype that it computes in; 4 linears have float32 scales"
    ]
    written = json.loads((out / "conversion_proof.json").read_text())
    assert all(entry["scales"] == "equal" for entry in written["linears"].values())
    found = load_file(out / "model.safetensors")
    for name in attention():
        assert np.array_equal(found[f"{name}.weight_scale"], wide[f"{name}.weight_scale"])
