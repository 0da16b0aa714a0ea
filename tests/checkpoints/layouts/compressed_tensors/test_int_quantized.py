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
from linear_strategies import build

from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import AffineLinear, FormatError, dequantize
from quantline.checkpoints.layouts.compressed_tensors import int_quantized
from quantline.checkpoints.quantization_config import LayerSettings, describe, quantization_of
from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.core.errors import CheckpointError
from quantline.serving.rules import Target, facts_of, verdict

PYTHON = interpreter("llmcompressor")
LAYOUT = "compressed_tensors_int"


def linear(in_features: int, out_features: int, seed: int = 0, **parts: Any) -> AffineLinear:
    zeros = np.full((1, out_features), 128, np.int16)
    return build(8, in_features, out_features, -1, seed, **{"zeros": zeros, **parts})


def section(**changes: Any) -> dict[str, Any]:
    return {**describe(LAYOUT, bits=8, group_size=-1, symmetric=True), **changes}


def group(**changes: Any) -> dict[str, Any]:
    changed = section()
    changed["config_groups"]["group_0"].update(changes)
    return changed


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": config}))
    if tensors:
        write_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_codes_are_signed_and_output_first() -> None:
    tensors = int_quantized.write(linear(3, 2, codes=np.array([[0, 255], [127, 128], [129, 1]], np.uint8)))
    assert tensors["weight"].dtype == np.int8
    assert tensors["weight"].tolist() == [[-128, -1, 1], [127, 0, -127]]
    assert tensors["weight_scale"].shape == (2, 1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_reads_back_what_it_wrote(in_features: int, out_features: int, seed: int) -> None:
    before = linear(in_features, out_features, seed)
    after = int_quantized.read(int_quantized.write(before), bits=8, group_size=-1)
    for name in ("codes", "scales", "zeros", "group_index"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name


def test_what_it_cannot_hold_is_refused() -> None:
    for held, fact in [
        (build(2, 8, 8, -1), "bits=2 group_size=-1"),
        (build(4, 8, 8, -1, zeros=np.full((1, 8), 7, np.int16)), "zero points differ from the middle"),
        (build(8, 8, 8, 4), "bits=8 group_size=4"),
        (linear(8, 8, zeros=np.zeros((1, 8), np.int16)), "zero points differ from the middle"),
    ]:
        with pytest.raises(FormatError, match=fact):
            int_quantized.write(held)
    tensors = int_quantized.write(linear(8, 4))
    for change, fact in [
        ({"weight": np.zeros((4, 8), np.uint8)}, "weight is uint8"),
        ({"weight_scale": np.ones((4, 2), np.float32)}, "weight_scale has shape"),
        ({"weight_zero_point": np.zeros((4, 1), np.int8)}, "does not have: weight_zero_point"),
    ]:
        with pytest.raises(FormatError, match=fact):
            int_quantized.read({**tensors, **change}, bits=8, group_size=-1)
    with pytest.raises(FormatError, match=r"codes has values in \[255, 255\]"):  # -9 at 4 bits
        int_quantized.read({**tensors, "weight": np.full((4, 8), -9, np.int8)}, bits=4, group_size=-1)


@given(st.integers(1, 8), st.integers(1, 40), st.sampled_from([-1, 16]), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_codes_of_4_bits_are_one_a_byte_in_groups(blocks: int, out_features: int, size: int, seed: int) -> None:
    groups = 1 if size == -1 else blocks
    before = build(4, 16 * blocks, out_features, size, seed, zeros=np.full((groups, out_features), 8, np.int16))
    tensors = int_quantized.write(before)
    assert tensors["weight"].shape == (out_features, 16 * blocks)
    assert tensors["weight"].min() >= -8
    after = int_quantized.read(tensors, bits=4, group_size=size)
    for name in ("codes", "scales", "zeros", "group_index"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name


def test_what_is_described_is_what_is_read(tmp_path: Path) -> None:
    info = quantization_of(written(tmp_path, section(ignore=["lm_head"])))
    assert info is not None
    assert (info.layout, info.bits, info.group_size, info.symmetric, info.activation_bits) == (LAYOUT, 8, -1, True, 8)
    assert info.modules_to_not_convert == ("lm_head",)
    four = describe(LAYOUT, bits=4, group_size=64, symmetric=True)
    info = quantization_of(written(tmp_path, four))
    assert info is not None
    assert (info.layout, info.bits, info.group_size, info.activation_bits) == (LAYOUT, 4, 64, 8)
    for values in (
        {"bits": 3},
        {"group_size": 64},
        {"symmetric": False},
        {"overrides": {"a.b": LayerSettings(8, 64, True)}},
    ):
        with pytest.raises(CheckpointError, match="all linears alike"):
            describe(LAYOUT, **{"bits": 8, "group_size": -1, "symmetric": True, **values})


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        (group(input_activations=None), "with input_activations None"),
        (group(input_activations={"num_bits": 8, "strategy": "tensor", "dynamic": False}), "with input_activations"),
        (
            group(input_activations={"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}),
            "symmetric",
        ),
        (group(output_activations={"num_bits": 8}), "has .*_activations"),
        (group(weights={"num_bits": 8, "strategy": "tensor"}), "has weights"),
        (group(weights={"num_bits": 8, "strategy": "channel", "symmetric": False}), "with weights"),
        (group(targets=["model.a"]), "0 groups for Linear"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path: Path, config: dict[str, Any], fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact):
        quantization_of(written(tmp_path, config))


def checkpoint(folder: Path) -> tuple[Path, AffineLinear]:
    folder.mkdir()
    held = linear(64, 32)
    tensors = {f"a.0.{suffix}": array for suffix, array in int_quantized.write(held).items()}
    floats = {"a.norm.weight": np.ones(64, np.float16), "lm_head.weight": np.ones((8, 64), np.float16)}
    return written(folder, section(ignore=["lm_head"]), {**tensors, **floats}), held


def test_a_checkpoint_is_dequantized_to_what_its_codes_mean_and_its_float_weights_stay(tmp_path: Path) -> None:
    folder, held = checkpoint(tmp_path / "in")
    found = dict(iter_dequantized(folder))
    assert sorted(found) == ["a.0.weight", "a.norm.weight", "lm_head.weight"]
    assert np.array_equal(found["a.0.weight"], dequantize(held))
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a\.0 is packed, but config\.json says float"):
        list(iter_dequantized(folder))


def test_codes_without_their_scale_are_not_taken_for_a_float_weight(tmp_path: Path) -> None:
    tensors = int_quantized.write(linear(8, 8))
    folder = written(
        tmp_path, section(), {**{f"a.0.{k}": v for k, v in tensors.items()}, "a.1.weight": tensors["weight"]}
    )
    with pytest.raises(CheckpointError, match=r"a\.1 lacks weight_scale"):
        list(iter_dequantized(folder))


def test_convert_keeps_it_and_says_what_is_lost_elsewhere(tmp_path: Path) -> None:
    folder, held = checkpoint(tmp_path / "in")
    for label, target, rewritten in (("kept", "auto", False), ("packed", "compressed_tensors", True)):
        out = tmp_path / label
        out.mkdir()
        proof = convert(folder, out, ConvertConfig(target=target))
        assert (proof.rewritten, proof.counts["linears"], proof.counts["carried_tensors"]) == (rewritten, 1, 2)
        assert any("also rounds activations" in note for note in proof.warnings) == rewritten
        assert np.array_equal(dict(iter_dequantized(out))["a.0.weight"], dequantize(held))


@pytest.mark.parametrize(("device", "serves"), [("cpu", True), ("cuda", True)])
def test_vllm_takes_it_where_it_refuses_eight_bit_weights_alone(device: str, serves: bool) -> None:
    assert verdict(Target("vllm", "0.32.0", device), facts_of(section())).supported == serves
    alone = describe("compressed_tensors", bits=8, group_size=-1, symmetric=True)
    assert verdict(Target("vllm", "0.32.0", device), facts_of(alone)).supported == (device == "cuda")


# The library itself: what it makes of our tensors and of our section.
LIBRARY = """
import json, sys, numpy, torch
from compressed_tensors.compressors import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
folder = sys.argv[1]
config = QuantizationConfig(**json.load(open(folder + "/section.json")))
assert config.format == "int-quantized"
state = {name: torch.from_numpy(array) for name, array in numpy.load(folder + "/in.npz").items()}
weight = IntQuantizationCompressor.decompress(state, config.config_groups["group_0"])["weight"]
numpy.save(folder + "/out.npy", weight.float().numpy())
"""


@pytest.mark.toolchain("llmcompressor")
def test_the_library_dequantizes_the_same(tmp_path: Path) -> None:
    held = linear(48, 20, scales=np.random.default_rng(0).random((1, 20)).astype(np.float32))
    (tmp_path / "section.json").write_text(json.dumps(section()))
    np.savez(tmp_path / "in.npz", **int_quantized.write(held))
    run = subprocess.run([PYTHON, "-c", LIBRARY, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), dequantize(held))
