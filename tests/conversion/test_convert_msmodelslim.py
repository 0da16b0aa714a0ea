"""The five modes that msModelSlim documents, on checkpoints that it wrote itself, read back by nothing of this project's
converter: plain arithmetic on the source's int8 codes against plain arithmetic on the target's words.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkout_paths import FIXTURES as SHARED

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers, write_safetensors
from quantline.checkpoints.layouts import quantize_rtn
from quantline.checkpoints.layouts.msmodelslim.files import write_files
from quantline.checkpoints.safetensors_file import read_header, to_float32
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.conversion.proof import PROOF_NAME
from quantline.core.errors import UserError
from quantline.pipeline.hashing import hash_folder

FIXTURES = SHARED / "msmodelslim"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the msModelSlim checkpoints are not there")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The five documented modes: fixture, target, bits, group size.
MODES = [
    ("w4a16_g64_awq_sym", "awq", 4, 64),
    ("w4a16_g64_awq_asym", "awq", 4, 64),
    ("w4a16_g64_awq_sym", "gptq", 4, 64),
    ("w4a16_perchannel_gptq_sym", "gptq", 4, -1),
    ("w8a16_g64_gptq_sym", "gptq", 8, 64),
    ("w8a16_perchannel", "gptq", 8, -1),
]
pytestmark = needs_fixtures


@pytest.fixture(scope="module")
def per_channel_w8(tmp_path_factory):
    """The mode without a fixture: the float model in W8A16, one scale a channel, in the tool's own files."""
    folder = tmp_path_factory.mktemp("w8") / "w8a16_perchannel"
    folder.mkdir()
    model = Checkpoint.open(SHARED / "float_model")
    linears, rest = {}, {}
    for name in model.names:
        tensor = np.array(model.tensor(name))
        if name.removesuffix(".weight").rpartition(".")[2] in LINEARS and tensor.ndim == 2:
            linears[name.removesuffix(".weight")] = quantize_rtn(to_float32(tensor), 8, -1, symmetric=True)
        else:
            rest[name] = tensor
    write_files(folder, linears, rest)
    (folder / "config.json").write_bytes((SHARED / "float_model" / "config.json").read_bytes())
    return folder


def source_of(name, per_channel):
    return per_channel if name == "w8a16_perchannel" else FIXTURES / name


def raw(folder):
    """Every tensor of a folder, by the safetensors header alone."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for name, info in read_header(path).items():
            kinds = {"I8": "i1", "I32": "<u4", "F16": "<f2", "F32": "<f4"}
            piece = np.frombuffer(data, kinds[info.dtype], offset=info.offset, count=int(np.prod(info.shape)))
            tensors[name] = piece.reshape(info.shape)
    return tensors


def fields(words, bits, axis, order=None):
    """Codes of packed words, by definition: field k of a word is value order[k] of its run."""
    per_word = 32 // bits
    order = order or range(per_word)
    moved = np.moveaxis(words, axis, -1)
    codes = np.zeros((*moved.shape, per_word), np.int64)
    for place, value in enumerate(order):
        codes[..., value] = (moved >> np.uint32(place * bits)) & np.uint32(2**bits - 1)
    return np.moveaxis(codes.reshape(*moved.shape[:-1], -1), -1, axis)


@pytest.mark.parametrize("mode", MODES)
def test_codes_zero_points_and_scales_of_every_linear_are_those_of_the_source(tmp_path, per_channel_w8, mode):
    fixture, target, bits, group_size = mode
    source = source_of(fixture, per_channel_w8)
    proof = convert(source, tmp_path, ConvertConfig(target=target))
    before, after = raw(source), raw(tmp_path)
    linears = [name.removesuffix(".weight_scale") for name in before if name.endswith(".weight_scale")]
    assert len(linears) == 14 == proof.counts["linears"]
    symmetric = True
    for name in linears:
        codes = before[f"{name}.weight"].astype(np.int64) + 2 ** (bits - 1)  # (out, in)
        zeros = before[f"{name}.weight_offset"].astype(np.int64) + 2 ** (bits - 1)  # (out, groups)
        order = (0, 2, 4, 6, 1, 3, 5, 7) if target == "awq" else None
        assert np.array_equal(fields(after[f"{name}.qweight"], bits, 1 if target == "awq" else 0, order).T, codes)
        stored = fields(after[f"{name}.qzeros"], bits, 1, order)
        if target == "gptq":
            stored = (stored + 1) % 2**bits
            rows = codes.shape[1]
            assert np.array_equal(after[f"{name}.g_idx"], np.arange(rows) // (rows if group_size == -1 else group_size))
        assert np.array_equal(stored.T, zeros)
        symmetric &= bool((zeros == 2 ** (bits - 1)).all())
        assert np.array_equal(after[f"{name}.scales"].T, before[f"{name}.weight_scale"].astype(np.float16))
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["quant_method"]) == (bits, group_size, target)
    if target == "gptq":
        assert settings["sym"] == symmetric
        assert settings["desc_act"] is False
        assert json.loads((tmp_path / "quantize_config.json").read_text()) == settings
    else:
        assert settings["version"] == "gemm"
        assert settings["zero_point"] is True


@pytest.mark.parametrize("mode", MODES)
def test_everything_else_is_carried_over_and_accounted_for(tmp_path, per_channel_w8, mode):
    fixture, target = mode[:2]
    source = source_of(fixture, per_channel_w8)
    proof = convert(source, tmp_path, ConvertConfig(target=target))
    before, after = raw(source), raw(tmp_path)
    for tensor in proof.carried:
        assert after[tensor.name].tobytes() == before[tensor.source].tobytes()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert after[name].tobytes() == before[name].tobytes()
    used = {tensor.source for tensor in proof.carried} | set(proof.left_out_tensors)
    quantized = {
        f"{linear.name}.{suffix}" for linear in proof.linears for suffix in ("weight", "weight_scale", "weight_offset")
    }
    assert used | quantized == set(before)
    assert not used & quantized
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, source))
    assert {**original, "quantization_config": config["quantization_config"]} == config
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).exists():
            assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / PROOF_NAME).read_text())
    assert written["counts"]["linears"] == len(written["linears"]) == 14
    assert all(entry["codes"] == entry["zero_points"] == "equal" for entry in written["linears"].values())
    assert 0 <= written["metrics"]["largest_relative_weight_difference"] <= 2**-11
    assert not list(tmp_path.rglob(".*"))


def test_norms_smoothed_by_m3_come_from_their_wrapped_copy_and_zero_biases_go(tmp_path):
    source = FIXTURES / "w4a16_g64_awq_asym"
    proof = convert(source, tmp_path, ConvertConfig(target="awq"))
    names = {tensor.name: tensor.source for tensor in proof.carried}
    assert names["model.layers.0.input_layernorm.weight"] == "model.layers.0.input_layernorm.module.weight"
    assert "model.layers.0.input_layernorm.bias" in proof.left_out_tensors
    assert not any("module" in name or "layernorm.bias" in name for name in raw(tmp_path))


def test_auto_takes_awq_for_four_bits_and_compressed_tensors_for_eight(tmp_path):
    for fixture, layout in (("w4a16_g64_awq_asym", "awq_gemm"), ("w8a16_g64_gptq_sym", "compressed_tensors")):
        out = tmp_path / fixture
        out.mkdir()
        assert convert(FIXTURES / fixture, out, ConvertConfig(target="auto")).target == layout
        assert quantization_of(out).layout == layout


@pytest.mark.parametrize("variant", ["safe_tensor", "ascendV1", "v1"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_save_mode_whole_or_sharded_gives_the_same_output(tmp_path, variant, shards):
    random = np.random.default_rng(0)
    linears = {
        f"model.layers.{index}.mlp.up_proj": quantize_rtn(
            random.normal(size=(64, 128)).astype(np.float32), 4, 32, False
        )
        for index in range(4)
    }
    rest = {"model.embed_tokens.weight": random.normal(size=(16, 128)).astype(np.float16)}
    hashes = []
    for label, kind, count in (("plain", "safe_tensor", 1), ("other", variant, shards)):
        folder, out = tmp_path / label, tmp_path / f"{label}-out"
        folder.mkdir()
        out.mkdir()
        write_files(folder, linears, rest, variant=kind, shards=count)
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
        convert(folder, out, ConvertConfig(target="gptq"))
        hashes.append(hash_folder(out).tensors)
    assert hashes[0] == hashes[1]


def test_mixed_bits_go_to_compressed_tensors_and_nowhere_else(tmp_path):
    random = np.random.default_rng(0)
    linears = {
        f"model.layers.0.mlp.{name}": quantize_rtn(random.normal(size=(64, 128)).astype(np.float32), bits, 32, True)
        for name, bits in (("up_proj", 4), ("gate_proj", 4), ("down_proj", 8))
    }
    source = tmp_path / "source"
    source.mkdir()
    write_files(source, linears, {"model.embed_tokens.weight": np.ones((16, 128), np.float16)})
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    for target in ("awq", "gptq", "gptq_v2"):
        with pytest.raises(UserError, match=r"several kinds .*use compressed_tensors"):
            convert(source, tmp_path / "nowhere", ConvertConfig(target=target))
    out = tmp_path / "out"
    out.mkdir()
    proof = convert(source, out, ConvertConfig(target="compressed_tensors"))
    assert {linear.name: linear.bits for linear in proof.linears} == {name: one.bits for name, one in linears.items()}
    info = quantization_of(out)
    assert set(quantized_layers(Checkpoint.open(out), info)) == set(linears)
    assert info.of("model.layers.0.mlp.down_proj").bits == 8


def test_a_folder_of_float_weights_is_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": np.ones((8, 8), np.float16)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not quantized"):
        convert(tmp_path, tmp_path / "out", ConvertConfig(target="awq"))
