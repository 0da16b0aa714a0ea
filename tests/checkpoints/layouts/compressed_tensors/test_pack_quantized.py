from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout_paths import interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_strategies import build, linears

from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import AffineLinear, FormatError, dequantize
from quantline.checkpoints.layouts.compressed_tensors import pack_quantized
from quantline.checkpoints.quantization_config import LayerSettings, describe, quantization_of
from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.core.errors import CheckpointError


def words(array: np.ndarray) -> list[list[int]]:
    return array.view(np.uint32).tolist()


def test_codes_are_unsigned_sequential_along_in_and_output_first() -> None:
    codes = np.zeros((10, 2), np.uint8)
    codes[:, 1] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    tensors = pack_quantized.write(build(4, 10, 2, -1, codes=codes))
    assert words(tensors["weight_packed"]) == [[0, 0], [0x87654321, 0xA9]]
    assert tensors["weight_shape"].tolist() == [2, 10]
    assert tensors["weight_shape"].dtype == np.int64


def test_zero_points_are_packed_along_out() -> None:
    zeros = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [0] * 8 + [15]], np.int16)
    tensors = pack_quantized.write(build(4, 4, 9, 2, zeros=zeros))
    assert words(tensors["weight_zero_point"]) == [[0x87654321, 0], [9, 15]]


def test_three_bit_codes_straddle_words() -> None:
    codes = np.full((11, 1), 7, np.uint8)
    assert words(pack_quantized.write(build(3, 11, 1, -1, codes=codes))["weight_packed"]) == [[0xFFFFFFFF, 1]]


@pytest.mark.parametrize("out", [320, 48])  # 48 zero points take five words in both packings
def test_three_bit_words_of_ten_codes_as_they_were_written_before_are_read(out: int) -> None:
    linear = build(3, 160, out, 32)
    tensors = pack_quantized.write(linear, zero_points=True)

    def former(values: np.ndarray) -> np.ndarray:
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % 10)))
        fields = values.reshape(values.shape[0], -1, 10).astype(np.uint32) << np.arange(0, 30, 3, dtype=np.uint32)
        return np.bitwise_or.reduce(fields, axis=2).view(np.int32)

    tensors["weight_packed"] = former(linear.codes.T)
    tensors["weight_zero_point"] = np.ascontiguousarray(former(linear.zeros.astype(np.uint8)).T)
    again = pack_quantized.read(tensors, bits=3, group_size=32)
    assert np.array_equal(again.codes, linear.codes)
    assert np.array_equal(again.zeros, linear.zeros)


def test_symmetric_layers_have_no_zero_points_unless_asked() -> None:
    linear = build(4, 8, 8, -1, zeros=np.full((1, 8), 8, np.int16))
    assert "weight_zero_point" not in pack_quantized.write(linear)
    assert words(pack_quantized.write(linear, zero_points=True)["weight_zero_point"]) == [[0x88888888]]
    with pytest.raises(FormatError, match="zero points differ"):
        pack_quantized.write(build(4, 8, 8, -1, zeros=np.zeros((1, 8), np.int16)), zero_points=False)


def check_round_trip(linear: AffineLinear, zero_points: bool | None) -> None:
    tensors = pack_quantized.write(linear, zero_points=zero_points)
    again = pack_quantized.read(tensors, bits=linear.bits, group_size=linear.group_size)
    for name in ("codes", "scales", "zeros", "group_index"):
        assert np.array_equal(getattr(again, name), getattr(linear, name)), name
        assert getattr(again, name).dtype == getattr(linear, name).dtype


@given(linears(st.sampled_from([2, 3, 4, 8]), (1, 16, 32, 128, -1), reorder=True), st.sampled_from([None, True]))
@settings(max_examples=80, deadline=None)
def test_reads_back_what_it_wrote(linear: AffineLinear, zero_points: bool | None) -> None:
    check_round_trip(linear, zero_points)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_widths_need_not_fill_words(bits: int, in_features: int, out_features: int, seed: int) -> None:
    check_round_trip(build(bits, in_features, out_features, -1, seed), None)


def test_a_group_index_that_was_never_filled_in_means_consecutive_groups() -> None:
    tensors = pack_quantized.write(build(4, 8, 8, 4))
    tensors["weight_g_idx"] = np.full(8, -1, np.int32)
    assert pack_quantized.read(tensors, bits=4, group_size=4).sequential


def test_tensors_that_disagree_are_refused() -> None:
    tensors = pack_quantized.write(build(4, 16, 8, 8))
    for change, fact in [
        ({"weight_shape": np.array([8, 32])}, "weight_packed has shape"),
        ({"weight_shape": np.array([8, 16, 1])}, "two sizes"),
        ({"weight_zero_point": np.zeros((2, 2), np.int32)}, "weight_zero_point has shape"),
        ({"weight_g_idx": np.zeros(16, np.float32)}, "weight_g_idx is float32"),
    ]:
        with pytest.raises(FormatError, match=fact):
            pack_quantized.read({**tensors, **change}, bits=4, group_size=8)


# The config section


def written(folder: Path, section: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return folder


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, -1), (4, -1), (8, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["awq_gemm", "awq_gemv", "gptq", "gptq_v2", "compressed_tensors"])
def test_what_is_described_is_what_is_read(
    tmp_path: Path, layout: str, bits: int, group_size: int, symmetric: bool
) -> None:
    values: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    values["modules_to_not_convert"] = ["lm_head", "model.layers.0.mlp.down_proj"]
    if bits == 8 and layout.startswith("awq"):
        with pytest.raises(CheckpointError, match="stores 4 bits only"):
            describe(layout, **values)
        return
    info = quantization_of(written(tmp_path, describe(layout, **values)))
    assert info is not None
    assert (info.layout, info.bits, info.group_size, info.desc_act) == (layout, bits, group_size, False)
    assert info.symmetric == (symmetric and not layout.startswith("awq"))  # AWQ always says that it has zero points
    assert list(info.modules_to_not_convert) == values["modules_to_not_convert"]


def test_reordered_groups_are_described(tmp_path: Path) -> None:
    for layout in ("gptq", "compressed_tensors"):
        section = describe(layout, bits=4, group_size=32, symmetric=True, desc_act=True)
        info = quantization_of(written(tmp_path, section))
        assert info is not None
        assert info.desc_act
    with pytest.raises(CheckpointError, match="no desc_act"):
        describe("awq_gemm", bits=4, group_size=32, symmetric=True, desc_act=True)


def test_mixed_bits_are_named_module_by_module(tmp_path: Path) -> None:
    other = {
        "model.layers.0.mlp.down_proj": LayerSettings(8, -1, True),
        "model.norm_free.x": LayerSettings(4, 64, False),
    }
    section = describe("compressed_tensors", bits=4, group_size=64, symmetric=False, overrides=other)
    assert len(section["config_groups"]) == 2  # the second is what all have
    info = quantization_of(written(tmp_path, section))
    assert info is not None
    assert info.of("model.layers.0.mlp.down_proj") == LayerSettings(8, -1, True)
    assert info.of("model.layers.0.mlp.up_proj") == LayerSettings(4, 64, False)
    with pytest.raises(CheckpointError, match="convert to gptq or compressed_tensors"):
        describe("awq_gemm", bits=4, group_size=64, symmetric=True, overrides=other)


def test_gptq_names_linears_of_other_bits_by_pattern_and_the_module_that_vllm_fuses_them_to(tmp_path: Path) -> None:
    other = {f"a.{part}": LayerSettings(8, 32, True) for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
    section = describe("gptq", bits=4, group_size=64, symmetric=True, overrides=other)
    assert section["dynamic"][r"+:^a\.qkv_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    info = quantization_of(written(tmp_path, section))
    assert info is not None
    assert (info.of("a.o_proj"), info.of("b.o_proj")) == (LayerSettings(8, 32, True), LayerSettings(4, 64, True))
    partly = describe("gptq", bits=4, group_size=64, symmetric=True, overrides={"a.q_proj": LayerSettings(8, 32, True)})
    assert set(partly["dynamic"]) == {r"+:^a\.q_proj$"}


def test_gptq_leaves_float_linears_out_by_pattern(tmp_path: Path) -> None:
    section = describe("gptq", bits=4, group_size=64, symmetric=True, modules_to_not_convert=["lm_head", "a.b"])
    assert section["dynamic"] == {r"-:^a\.b$": {}}
    section["dynamic"]["+:^a"] = {"bits": 5}
    with pytest.raises(CheckpointError, match="bits must be 2, 3, 4 or 8"):
        quantization_of(written(tmp_path, section))
    section["dynamic"]["+:^a"] = {"bits": 8, "mse": 1.0, "damp_percent": 0.05, "desc_act": True}  # about the making
    assert quantization_of(written(tmp_path, section)).of("a") == LayerSettings(8, 64, True)
    section["dynamic"]["+:^a"] = {"checkpoint_format": "gptq", "pack_dtype": None}  # as the whole section says
    assert quantization_of(written(tmp_path, section)).of("a") == LayerSettings(4, 64, True)
    for key, value in (("checkpoint_format", "gptq_v2"), ("pack_dtype", "int8"), ("new_key", 1)):
        section["dynamic"]["+:^a"] = {key: value}
        with pytest.raises(CheckpointError, match=f"sets {key} to .*: linears may differ in bits, group_size and sym"):
            quantization_of(written(tmp_path, section))


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("gptq", "sym", "yes"), ("awq", "zero_point", 7), ("gptq", "desc_act", []), ("awq", "modules_to_not_convert", 7),
        ("gptq", "modules_to_not_convert", ["lm_head", 1]), ("gptq", "dynamic", [1]),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_its_key(tmp_path: Path, method: str, key: str, value: Any) -> None:
    section = {"quant_method": method, "bits": 4, "group_size": 64, key: value}
    with pytest.raises(CheckpointError, match=key):
        quantization_of(written(tmp_path, section))


def weights_with(**changes: Any) -> dict[str, Any]:
    section = describe("compressed_tensors", bits=4, group_size=32, symmetric=True)
    section["config_groups"]["group_0"]["weights"].update(changes)
    return section


def group_with(**changes: Any) -> dict[str, Any]:
    section = describe("compressed_tensors", bits=4, group_size=32, symmetric=True)
    section["config_groups"]["group_0"].update(changes)
    return section


@pytest.mark.parametrize(
    ("section", "fact"),
    [
        (weights_with(type="float"), "group group_0 has weights"),
        (weights_with(strategy="tensor"), "group group_0 has weights"),
        (weights_with(num_bits=6), "group group_0 has weights"),
        (weights_with(dynamic=True), "group group_0 has weights"),
        (weights_with(actorder="sideways"), "unknown actorder"),
        (group_with(input_activations={"num_bits": 8}), "with input_activations"),
        (group_with(targets=["re:.*q_proj"]), "has targets"),
        (group_with(targets=["model.a"]), "0 groups for Linear"),
        ({**weights_with(), "format": "int-quantized"}, "stored as 'int-quantized'"),
        ({**weights_with(), "kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        ({**weights_with(), "sparsity_config": {"format": "sparse-24"}}, "with sparsity_config"),
        ({**weights_with(), "config_groups": {"W4A16": ["Linear"]}}, "a preset"),
        ({**weights_with(), "config_groups": {}}, "without config_groups"),
        ({**weights_with(), "ignore": "lm_head"}, "ignore is"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path, section: dict[str, Any], fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact):
        quantization_of(written(tmp_path, section))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_checkpoint_is_dequantized_to_what_its_codes_mean(tmp_path: Path, symmetric: bool) -> None:
    zeros = np.full((2, 16), 8, np.int16) if symmetric else None
    linear = build(4, 64, 16, 32, **({"zeros": zeros} if symmetric else {}))
    tensors = {f"a.b.{suffix}": array for suffix, array in pack_quantized.write(linear).items()}
    write_safetensors(tmp_path / "model.safetensors", {**tensors, "n.weight": np.ones(3, np.float16)})
    written(tmp_path, describe("compressed_tensors", bits=4, group_size=32, symmetric=symmetric))
    found = dict(iter_dequantized(tmp_path))
    assert sorted(found) == ["a.b.weight", "n.weight"]
    assert np.array_equal(found["a.b.weight"], dequantize(linear))


SHAPES = ((64, 32, 32, False), (66, 35, 33, False), (64, 24, 16, True), (48, 20, -1, False))


def test_linears_with_bits_of_their_own_are_dequantized_with_them(tmp_path: Path) -> None:
    linears = {"m.a": build(4, 64, 16, 32), "m.b": build(8, 64, 16, -1)}
    tensors = {
        f"{name}.{suffix}": array
        for name, linear in linears.items()
        for suffix, array in pack_quantized.write(linear, zero_points=True).items()
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    other = {"m.b": LayerSettings(8, -1, False)}
    written(tmp_path, describe("compressed_tensors", bits=4, group_size=32, symmetric=False, overrides=other))
    found = dict(iter_dequantized(tmp_path))
    assert all(np.array_equal(found[f"{name}.weight"], dequantize(linear)) for name, linear in linears.items())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"m\.a is packed, but config\.json says float"):
        list(iter_dequantized(tmp_path))


# The library itself: its packing, its unpacking, its reading of our section.
LIBRARY = """
import json, sys, numpy, torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
folder = sys.argv[1]
cases = json.load(open(folder + "/cases.json"))
out = {}
for name, case in cases.items():
    data = {k: torch.from_numpy(v) for k, v in numpy.load(f"{folder}/{name}.npz").items()}
    bits, shape = case["bits"], tuple(data["q"].shape)
    out[name + ".packed"] = pack_to_int32(data["q"], bits).numpy()
    out[name + ".zeros"] = pack_to_int32(data["z"], bits, packed_dim=0).contiguous().numpy()
    assert torch.equal(unpack_from_int32(data["weight_packed"], bits, shape), data["q"])
    config = QuantizationConfig(**case["section"])
    assert config.format == "pack-quantized" and config.ignore == ["lm_head"]
    state = {k: v for k, v in data.items() if k.startswith("weight")}
    scheme = config.config_groups["group_0"]
    out[name + ".weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].float().numpy()
numpy.savez(folder + "/out.npz", **out)
"""


@pytest.mark.toolchain("vllm")
@pytest.mark.toolchain("llmcompressor")
@pytest.mark.parametrize(("environment", "widths"), [("vllm", (2, 4, 8)), ("llmcompressor", (2, 3, 4, 8))])
def test_the_library_packs_unpacks_and_dequantizes_the_same(tmp_path: Path, environment: str, widths: Any) -> None:
    """As vLLM has it (0.17, which packed 3 bits otherwise and reads them by itself), and as llm-compressor has it (0.19)."""
    python = interpreter(environment)
    cases, layers = {}, {}
    for bits in widths:
        for in_features, out_features, group, reorder in SHAPES:
            if reorder and environment == "llmcompressor":
                continue  # 0.19 no longer knows reordered groups
            name = f"b{bits}_{in_features}_{group}"
            scales = _scales(in_features, out_features, group)
            linear = build(bits, in_features, out_features, group, bits, scales=scales)
            if reorder:
                np.random.default_rng(1).shuffle(linear.group_index)
            tensors = pack_quantized.write(linear, zero_points=True)
            middle = 2 ** (bits - 1)
            q = (linear.codes.T.astype(np.int16) - middle).astype(np.int8)
            z = (linear.zeros.T - middle).astype(np.int8)
            np.savez(tmp_path / f"{name}.npz", q=np.ascontiguousarray(q), z=np.ascontiguousarray(z), **tensors)
            section = describe(
                "compressed_tensors",
                bits=bits,
                group_size=group,
                symmetric=False,
                desc_act=reorder,
                modules_to_not_convert=["lm_head"],
            )
            cases[name], layers[name] = {"bits": bits, "section": section}, (linear, tensors)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run([python, "-c", LIBRARY, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    theirs = np.load(tmp_path / "out.npz")
    for name, (linear, tensors) in layers.items():
        assert np.array_equal(theirs[f"{name}.packed"], tensors["weight_packed"]), name
        assert np.array_equal(theirs[f"{name}.zeros"], tensors["weight_zero_point"]), name
        assert np.array_equal(theirs[f"{name}.weight"], dequantize(linear)), name


def _scales(in_features: int, out_features: int, group: int) -> np.ndarray:
    groups = 1 if group == -1 else in_features // group
    return np.random.default_rng(0).random((groups, out_features)).astype(np.float32)
