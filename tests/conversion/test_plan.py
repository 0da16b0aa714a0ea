"""What is refused before anything is written, all of it at once, each with its tensor, the fact and the remedy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.layouts import LAYOUTS, dequantize, quantize_rtn
from quantline.checkpoints.layouts.msmodelslim.files import write_files
from quantline.checkpoints.quantization_config import describe
from quantline.config.convert import ConvertConfig
from quantline.conversion import tensor_reader
from quantline.conversion.convert import convert
from quantline.conversion.errors import ConversionError
from quantline.core.errors import UserError
from quantline.serving.rules import Target, facts_of, verdict

NAME = "model.layers.{}.mlp.up_proj"
VLLM = Target("vllm", "0.32.0", "cpu")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def linear(bits=4, *, symmetric=False, rows=64, columns=64, group=32, seed=0):
    weight = np.random.default_rng(seed).normal(size=(columns, rows)).astype(np.float32)
    return quantize_rtn(weight, bits, group, symmetric)


def msmodelslim(folder, linears, rest=(), changed=()):
    """A checkpoint of msModelSlim's, some tensors of which are then changed."""
    folder.mkdir()
    write_files(folder, linears, dict(rest))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (weights,) = folder.glob("*.safetensors")
    tensors = tensors_of(weights)
    for name, value in dict(changed).items():
        tensors.pop(name) if value is None else tensors.update({name: value(np.array(tensors[name]))})
    write_safetensors(weights, tensors)
    return folder


def tensors_of(path):
    from safetensors.numpy import load_file

    return load_file(path)


def gptq(folder, linears, layout="gptq"):
    folder.mkdir()
    tensors = {
        f"{name}.{suffix}": v for name, one in linears.items() for suffix, v in LAYOUTS[layout].write(one).items()
    }
    write_safetensors(folder / "model.safetensors", tensors)
    one = next(iter(linears.values()))
    settings = describe(layout, bits=one.bits, group_size=one.group_size, symmetric=False)
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return folder


def refused(source, out, target, serving=None, **options):
    with pytest.raises(UserError) as caught:
        convert(source, out, ConvertConfig(target=target, **options), serving=serving)
    assert list(out.iterdir()) == []
    return str(caught.value)


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def test_every_reason_is_found_at_once_and_nothing_is_written(tmp_path, out):
    source = msmodelslim(
        tmp_path / "in", {NAME.format(index): linear(8 if index == 3 else 4, seed=index) for index in range(5)},
        rest={"model.norm.weight": np.ones(64, np.float16), "model.norm.bias": np.full(64, 0.5, np.float16)},
        changed={
            f"{NAME.format(0)}.weight_offset": put((3, 1), -35.0),
            f"{NAME.format(1)}.weight_scale": put((5, 0), np.nan),
            f"{NAME.format(2)}.weight_scale": None,
            f"{NAME.format(4)}.weight_scale": put((5, 0), np.inf),
        },
    )  # fmt: skip
    message = refused(source, out, "awq")
    assert "for 7 reasons; nothing was written" in message
    assert f"{NAME.format(0)}: 1 of 128 groups have no exact zero point" in message
    assert "requantize_outliers" in message
    assert f"{NAME.format(1)}: 1 scales are infinite or NaN" in message
    assert f"{NAME.format(2)}: is quantized, but lacks {NAME.format(2)}.weight_scale" in message
    assert f"{NAME.format(3)}: has 8 bits, but AWQ supports 4; use gptq or compressed_tensors" in message
    assert f"{NAME.format(4)}: 1 scales are infinite or NaN" in message
    assert "model.norm.bias: is the bias of a norm and not zero" in message


def test_groups_without_an_exact_zero_point_are_quantized_again_on_request_and_each_is_reported(tmp_path, out):
    name = NAME.format(0)
    source = msmodelslim(
        tmp_path / "in", {name: linear(), NAME.format(1): linear(seed=1)},
        changed={f"{name}.weight_offset": put((3, 1), -35.0)},
    )  # fmt: skip
    proof = convert(source, out, ConvertConfig(target="awq", requantize_outliers=True))
    (group,) = proof.requantized
    assert (group["channel"], group["group"], group["old_offset"]) == (3, 1, -35.0)
    assert group["max_abs_error"] > 0
    written = json.loads((out / "conversion_proof.json").read_text())
    assert written["linears"][name]["requantized_groups"] == [group]
    assert written["counts"]["requantized_groups"] == 1
    assert written["metrics"]["largest_requantization_error"] == group["max_abs_error"]
    stored = tensors_of(next(source.glob("*.safetensors")))
    before = (
        stored[f"{name}.weight"].astype(np.float64).reshape(64, 2, 32) - stored[f"{name}.weight_offset"][:, :, None]
    )
    before = before * stored[f"{name}.weight_scale"][:, :, None]
    after = LAYOUTS["awq_gemm"].read(
        {suffix: Checkpoint.open(out).tensor(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales")},
        bits=4, group_size=32,
    )  # fmt: skip
    change = np.abs(dequantize(after).reshape(64, 2, 32) - before).max(axis=2)
    assert change[3, 1] == pytest.approx(group["max_abs_error"], rel=1e-2)
    change[3, 1] = 0
    assert change.max() < 1e-3 * np.abs(before).max()


def test_scales_outside_float16_are_refused_where_it_is_needed(tmp_path, out):
    name = NAME.format(0)
    for label, value in (("large", 1e6), ("small", 1e-12)):
        changed = {f"{name}.weight_scale": lambda old, v=value: put((0, 0), v)(old.astype(np.float32))}
        source = msmodelslim(tmp_path / label, {name: linear()}, changed=changed)
        tensors = tensors_of(next(source.glob("*.safetensors")))
        tensors[f"{name}.weight_offset"] = tensors[f"{name}.weight_offset"].astype(np.float32)
        write_safetensors(next(source.glob("*.safetensors")), tensors)
        message = refused(source, out, "gptq")
        assert f"{name}.weight_scale: 1 scales leave the range of float16" in message
        assert "compressed_tensors keeps float32" in message
        exact = tmp_path / f"{label}-exact"
        exact.mkdir()
        proof = convert(source, exact, ConvertConfig(target="compressed_tensors"))
        assert proof.linears[0].scales == "equal"


def test_reordered_groups_are_refused_by_awq(tmp_path, out):
    one = linear()
    order = np.random.default_rng(1).permutation(one.group_index).astype(np.int32)
    message = refused(gptq(tmp_path / "in", {NAME.format(0): replace(one, group_index=order)}), out, "awq")
    assert (
        f"{NAME.format(0)}: groups are reordered by activation (desc_act), which AWQ cannot store; use gptq" in message
    )


def test_widths_that_fill_no_words_are_refused_by_the_words_layouts(tmp_path, out):
    source = msmodelslim(tmp_path / "in", {NAME.format(0): linear(columns=60)})
    for target in ("awq", "gptq", "gptq_v2"):
        assert "out_features=60 does not fill whole words" in refused(source, out, target)
    convert(source, out, ConvertConfig(target="compressed_tensors"))


def test_a_missing_partner_of_a_gptq_linear_is_named_beside_other_faults(tmp_path, out):
    source = gptq(tmp_path / "in", {NAME.format(index): linear(seed=index) for index in range(3)})
    tensors = tensors_of(source / "model.safetensors")
    del tensors[f"{NAME.format(0)}.scales"]
    tensors[f"{NAME.format(1)}.scales"][0, 0] = np.nan
    write_safetensors(source / "model.safetensors", tensors)
    message = refused(source, out, "awq")
    assert f"{NAME.format(0)}: lacks {NAME.format(0)}.scales" in message
    assert f"{NAME.format(1)}: scales are infinite or NaN" in message


@pytest.mark.parametrize("file", ["config.json", "quant_model_description_w4a16.json"])
def test_unreadable_json_is_refused(tmp_path, out, file):
    source = msmodelslim(tmp_path / "in", {NAME.format(0): linear()})
    (source / file).write_text('{"model_type": ')
    assert file in refused(source, out, "awq")


def test_a_checkpoint_without_config_is_refused(tmp_path, out):
    source = msmodelslim(tmp_path / "in", {NAME.format(0): linear()})
    (source / "config.json").unlink()
    assert "config.json: is missing; copy it from the float model" in refused(source, out, "awq")


def test_a_number_in_quotes_is_refused_by_its_key(tmp_path, out):
    source = gptq(tmp_path / "in", {NAME.format(0): linear()})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_attention_heads": "6"}))
    assert 'config.json has num_attention_heads="6"; it must be a whole number' in refused(source, out, "awq")


def test_an_index_that_leaves_its_folder_is_refused(tmp_path, out):
    source = gptq(tmp_path / "in", {NAME.format(0): linear()})
    (source / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = tensors_of(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../outside.safetensors' is no file inside its folder" in refused(source, out, "awq")


def test_pickled_weights_are_refused_and_other_pickles_left_out(tmp_path, out):
    source = gptq(tmp_path / "in", {NAME.format(0): linear()})
    (source / "training_args.bin").write_bytes(b"\x80")
    proof = convert(source, out, ConvertConfig(target="awq"))
    assert proof.left_out_files["training_args.bin"] == "a pickle, which can run code"
    assert not (out / "training_args.bin").exists()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights only"):
        convert(source, out, ConvertConfig(target="awq"))


def test_codes_wider_than_described_are_refused_before_anything_is_written_all_layers_at_once(
    tmp_path, out, monkeypatch
):
    monkeypatch.setattr(tensor_reader, "_PASS", 1000)  # so that a tensor is read in several pieces
    monkeypatch.setattr("quantline.conversion.convert.write_weights", None)
    source = msmodelslim(
        tmp_path / "in", {NAME.format(index): linear(seed=index) for index in range(4)},
        changed={
            f"{NAME.format(0)}.weight": put((1, 1), 99), f"{NAME.format(1)}.weight": put((63, 63), -9),
            f"{NAME.format(3)}.weight": put((0, 0), 8), f"{NAME.format(3)}.weight_offset": put((3, 1), -35.0),
        },
    )  # fmt: skip
    message = refused(source, out, "awq")
    assert "for 4 reasons; nothing was written" in message
    for index, found in ((0, "[-8, 99]"), (1, "[-9, 7]"), (3, "[-8, 8]")):
        assert f"{NAME.format(index)}: codes are in {found}, but 4 bits allow [-8, 7]" in message
    assert f"{NAME.format(3)}: 1 of 128 groups have no exact zero point" in message


def test_zero_points_that_the_config_promises_and_no_file_holds_are_refused(tmp_path, out):
    folder = tmp_path / "in"
    gptq(folder, {NAME.format(index): linear(seed=index) for index in range(3)}, "compressed_tensors")
    tensors = tensors_of(folder / "model.safetensors")
    for index in (0, 2):
        del tensors[f"{NAME.format(index)}.weight_zero_point"]
    write_safetensors(folder / "model.safetensors", tensors)
    for target in ("awq", "keep"):
        message = refused(folder, out, target)
        assert "for 2 reasons" in message
        for name in (NAME.format(0), NAME.format(2)):
            assert (
                f"{name}: lacks {name}.weight_zero_point, but config.json says symmetric: false; fetch all" in message
            )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, out, ConvertConfig(target="awq"))


def test_what_the_target_cannot_serve_is_a_note_or_on_request_an_error(tmp_path, out):
    source = msmodelslim(tmp_path / "in", {NAME.format(0): linear()})
    message = refused(source, out, "gptq", serving=VLLM, must_serve="vllm")
    assert "convert.for=vllm: vllm 0.32.0 on cpu will not serve it: vLLM 0.32.0 serves symmetric GPTQ only" in message
    proof = convert(source, out, ConvertConfig(target="gptq"), serving=VLLM)
    (note,) = [note for note in proof.warnings if "serve" in note]
    assert note.startswith("vllm 0.32.0 on cpu will not serve it")


def test_a_zero_point_of_0_in_gptq_v1_is_noted(tmp_path, out):
    one = linear()
    proof = convert(
        msmodelslim(tmp_path / "in", {NAME.format(0): replace(one, zeros=np.zeros_like(one.zeros))}), out,
        ConvertConfig(target="gptq"),
    )  # fmt: skip
    assert "1 linears have a zero point of 0, which some readers of gptq mistake; gptq_v2 is safe" in proof.warnings


@pytest.mark.parametrize(
    ("bits", "symmetric", "desc_act", "rule"),
    [(4, True, False, ""), (4, False, False, ""), (8, True, False, "compressed-tensors-cpu-bits"),
     (4, True, True, "compressed-tensors-desc-act")],
)  # fmt: skip
def test_what_vllm_on_cpu_serves_of_compressed_tensors(bits, symmetric, desc_act, rule):
    settings = describe("compressed_tensors", bits=bits, group_size=64, symmetric=symmetric, desc_act=desc_act)
    assert verdict(VLLM, facts_of(settings)).rule_id == rule


def test_a_checkpoint_refused_for_one_reason_says_so():
    assert "for one reason" in str(ConversionError(["x", "x"]))
