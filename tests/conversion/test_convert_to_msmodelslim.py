"""msModelSlim as a target: what is written, what comes back from it, what it cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import TARGETS, dequantize, quantize_rtn
from quantline.checkpoints.layouts.msmodelslim import codec
from quantline.checkpoints.layouts.msmodelslim import files as msmodelslim_files
from quantline.checkpoints.layouts.msmodelslim.tensors import PACKED
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert as convert_with
from quantline.conversion.errors import ConversionError, ProofError
from quantline.conversion.source import open_source
from quantline.core.errors import ConfigError
from quantline.serving.rules import Target
from tests.conversion.test_convert import extreme_linears, format_of, weights, write_checkpoint
from tests.conversion.test_convert_msmodelslim import FIXTURES, needs_fixtures, raw

NAME = "model.layers.{}.mlp.up_proj"
VLLM = Target("vllm", "0.32.0", "cpu")
TO = ("msmodelslim", "msmodelslim_ascend_v1")
OTHERS = tuple(target for target in TARGETS if target not in TO)


def convert(source, out, target, serving=None, **options):
    out.mkdir()
    return convert_with(source, out, ConvertConfig(target=target, **options), serving=serving)


def linear(bits=4, *, rows=64, columns=64, group=32, symmetric=False, seed=0):
    weight = np.random.default_rng(seed).normal(size=(columns, rows)).astype(np.float32)
    return quantize_rtn(weight, bits, group, symmetric)


def tensors_of(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: np.array(checkpoint.tensor(name)).tobytes() for name in checkpoint.names}


@pytest.mark.parametrize("through", TO)
@pytest.mark.parametrize("one", OTHERS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one_linear=extreme_linears(), data=st.data())
def test_every_layout_goes_through_it_and_back_without_a_change(tmp_path_factory, one, through, one_linear, data):
    home = tmp_path_factory.mktemp("round")
    write_checkpoint(home / "in", TARGETS[one].name, {NAME.format(0): one_linear})
    size = data.draw(st.sampled_from(["1KB", "4GB"]))
    convert(home / "in", home / "there", through, shard_size=size)
    convert(home / "there", home / "back", one)
    before, after = tensors_of(home / "in"), tensors_of(home / "back")
    for found in (before, after):  # a symmetric checkpoint has none
        found.pop(f"{NAME.format(0)}.weight_zero_point", None)
    assert before == after
    before, after = weights(home / "in"), weights(home / "back")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("target", ["awq", "gptq", "compressed_tensors"])
@needs_fixtures
def test_codes_and_offsets_of_the_tool_come_back_byte_for_byte(tmp_path, target):
    source = FIXTURES / "w4a16_g64_awq_asym"
    convert(source, tmp_path / "there", target)
    convert(tmp_path / "there", tmp_path / "back", "msmodelslim")
    before, after = raw(source), raw(tmp_path / "back")
    linears = [name.removesuffix(".weight_scale") for name in before if name.endswith(".weight_scale")]
    assert len(linears) == 14
    for name in linears:
        assert after[f"{name}.weight"].tobytes() == before[f"{name}.weight"].tobytes()
        assert np.array_equal(after[f"{name}.weight_offset"], before[f"{name}.weight_offset"])
        kept = before[f"{name}.weight_scale"].astype(np.float16 if target == "awq" else np.float32)
        if target != "gptq":
            assert np.array_equal(after[f"{name}.weight_scale"], kept)
    described = json.loads((source / "quant_model_description_w4a16.json").read_text())
    ours = json.loads((tmp_path / "back" / "quant_model_description_w4a16.json").read_text())
    assert set(ours) <= set(described)  # but for the copies and zero biases of anti-outlier m3
    assert all(described[name] == scheme for name, scheme in ours.items() if "norm" not in name)


def test_the_folder_is_a_whole_checkpoint_with_its_proof(tmp_path):
    extra = {"lm_head.weight": np.ones((8, 64), np.float16), f"{NAME.format(0)}.bias": np.ones(64, np.float16)}
    source = write_checkpoint(tmp_path / "in", "awq_gemm", {NAME.format(0): linear()}, extra=extra.items())
    (source / "tokenizer.json").write_text("{}")
    (source / "quant_config.json").write_text("{}")
    proof = convert(source, tmp_path / "out", "msmodelslim")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "conversion_proof.json", "quant_model_description_w4a16.json",
        "quant_model_weight_w4a16.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "qwen2"}
    name = NAME.format(0)
    assert json.loads((tmp_path / "out" / "quant_model_description_w4a16.json").read_text()) == {
        "model_quant_type": "W4A16", "lm_head.weight": "FLOAT", "model.norm.weight": "FLOAT", f"{name}.bias": "FLOAT",
        f"{name}.weight": "W4A16", f"{name}.weight_scale": "W4A16", f"{name}.weight_offset": "W4A16",
    }  # fmt: skip
    assert (proof.source, proof.target, proof.counts["linears"]) == ("awq_gemm", "msmodelslim", 1)
    assert open_source(tmp_path / "out").kind == "msmodelslim safe_tensor"


@pytest.mark.parametrize("target", TO)
def test_linears_of_4_and_8_bits_of_groups_and_channels_share_a_checkpoint(tmp_path, target):
    linears = {
        NAME.format(0): linear(4), NAME.format(1): linear(8), NAME.format(2): linear(4, group=-1, rows=128),
        NAME.format(3): linear(8, group=-1, rows=128), NAME.format(4): linear(4, group=16),
    }  # fmt: skip
    source = tmp_path / "in"
    source.mkdir()
    msmodelslim_files.write_files(source, linears, {"model.norm.weight": np.ones(64, np.float16)}, variant="v1")
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    convert(source, tmp_path / "out", target)
    opened = open_source(tmp_path / "out")
    assert opened.kind == f"msmodelslim {'safe_tensor' if target == 'msmodelslim' else 'ascendV1'}"
    for name, one in linears.items():
        layer = opened.layers[name]
        assert (layer.bits, layer.group_size) == (one.bits, one.group_size)
        assert (layer.layout.name == PACKED) == (one.bits == 4 and target != "msmodelslim")
        assert np.array_equal(dequantize(opened.read(layer, False)[0]), dequantize(one))


def test_packed_codes_are_those_of_the_tools_own_save_mode(tmp_path):
    one = linear()
    source = write_checkpoint(tmp_path / "in", "gptq", {NAME.format(0): one})
    convert(source, tmp_path / "out", "msmodelslim_ascend_v1")
    expected = codec.write(one, packed=True)
    found = raw(tmp_path / "out")
    assert all(np.array_equal(found[f"{NAME.format(0)}.{suffix}"], array) for suffix, array in expected.items())
    head = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert (head["version"], head["group_size"], head["model_quant_type"]) == ("1.0.0", 32, "W4A16")


def test_shards_are_named_as_the_tool_names_them_and_the_index_names_every_tensor(tmp_path):
    source = write_checkpoint(
        tmp_path / "in", "gptq", {NAME.format(index): linear(8, seed=index) for index in range(4)}
    )
    convert(source, tmp_path / "out", "msmodelslim", shard_size="9KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"quant_model_weight_w8a16-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "quant_model_weight_w8a16.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    convert(tmp_path / "out", tmp_path / "back", "gptq")
    assert tensors_of(tmp_path / "back") == tensors_of(source)


@pytest.mark.parametrize("target", TO)
def test_what_it_cannot_hold_is_refused_at_once_with_tensor_fact_and_remedy(tmp_path, target):
    one = linear(3)
    order = np.random.default_rng(1).permutation(one.group_index).astype(np.int32)
    extra = {"model.norm.bias": np.ones(8, np.float16)}
    linears = {NAME.format(0): one, NAME.format(1): replace(linear(3, seed=1), group_index=order)}
    source = write_checkpoint(tmp_path / "in", "gptq", linears, extra=extra.items())
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out", target)
    assert list((tmp_path / "out").iterdir()) == []
    message = str(caught.value)
    assert f"{NAME.format(0)}: has 3 bits, but msModelSlim supports 4 and 8; use gptq or compressed_tensors" in message
    assert (
        f"{NAME.format(1)}: groups are reordered by activation (desc_act), which msModelSlim cannot store; use"
        in message
    )
    assert "model.norm.bias: is the bias of a norm" in message


def test_an_odd_height_is_refused_where_pairs_share_a_byte_and_nowhere_else(tmp_path):
    source = write_checkpoint(tmp_path / "in", "compressed_tensors", {NAME.format(0): linear(columns=61)})
    with pytest.raises(ConversionError, match="out_features=61 does not fill whole words of msmodelslim_ascend_v1"):
        convert(source, tmp_path / "packed", "msmodelslim_ascend_v1")
    convert(source, tmp_path / "plain", "msmodelslim")
    convert(tmp_path / "plain", tmp_path / "back", "compressed_tensors")
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_that_vllm_does_not_read_it_is_a_note_or_on_request_an_error(tmp_path):
    source = write_checkpoint(tmp_path / "in", "awq_gemm", {NAME.format(0): linear()})
    proof = convert(source, tmp_path / "out", "msmodelslim", serving=VLLM)
    assert proof.warnings == [
        "vllm 0.32.0 on cpu will not serve it: vLLM 0.32.0 reads no msModelSlim checkpoints; convert it to awq, gptq or "
        "compressed_tensors"
    ]
    with pytest.raises(ConversionError, match=r"convert\.for=vllm: vllm 0\.32\.0 on cpu will not serve it"):
        convert(source, tmp_path / "refused", "msmodelslim", serving=VLLM, must_serve="vllm")
    assert list((tmp_path / "refused").iterdir()) == []


@pytest.mark.parametrize("target", TO)
def test_the_pipeline_which_serves_what_it_converts_refuses_it(composed, target):
    from quantline.pipeline.config import parse

    with pytest.raises(ConfigError, match=f"convert.target={target}: the pipeline serves what it converts"):
        parse(composed(f"convert.target={target}"))
    parse(composed(f"convert.target={target}", "source=auto", "source.path=x"))


def test_a_quantized_output_layer_comes_back_quantized(tmp_path):
    source = write_checkpoint(tmp_path / "in", "gptq", {NAME.format(0): linear(), "lm_head": linear(seed=1)})
    convert(source, tmp_path / "there", "msmodelslim")
    described = json.loads((tmp_path / "there" / "quant_model_description_w4a16.json").read_text())
    assert described["lm_head.weight"] == "W4A16"
    convert(tmp_path / "there", tmp_path / "back", "gptq")
    assert format_of(tmp_path / "back")["lm_head"] is True
    assert tensors_of(tmp_path / "back") == tensors_of(source)


@pytest.mark.parametrize(("change", "said"), [(1, "codes read back from .* differ"), (64, "does not read back: codes")])
def test_codes_that_change_on_their_way_to_the_disk_are_caught(tmp_path, monkeypatch, change, said):
    source = write_checkpoint(tmp_path / "in", "awq_gemm", {NAME.format(0): linear()})
    from quantline.checkpoints.safetensors_stream import StreamedFile

    put = StreamedFile.put

    def faulty(self, name, array):
        put(self, name, array ^ np.int8(change) if array.dtype == np.int8 else array)

    monkeypatch.setattr(StreamedFile, "put", faulty)
    with pytest.raises(ProofError, match=f"{NAME.format(0)}: .*{said}"):
        convert(source, tmp_path / "out", "msmodelslim")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_saving_again_brings_every_save_mode_into_another(tmp_path):
    source, linears = tmp_path / "in", {NAME.format(0): linear()}
    source.mkdir()
    msmodelslim_files.write_files(source, linears, {"model.norm.weight": np.ones(64, np.float16)})
    (source / "config.json").write_text("{}")
    convert(source, tmp_path / "packed", "msmodelslim_ascend_v1")
    convert(tmp_path / "packed", tmp_path / "plain", "msmodelslim")
    assert {name: array.tobytes() for name, array in raw(tmp_path / "plain").items()} == {
        name: array.tobytes() for name, array in raw(source).items()
    }
