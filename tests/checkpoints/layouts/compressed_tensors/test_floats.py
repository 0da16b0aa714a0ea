"""Weights of floating-point codes: equal to what the library that writes them makes of the same tensors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout_paths import interpreter
from hypothesis import given
from hypothesis import strategies as st

from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS, FormatError, Storage
from quantline.checkpoints.layouts import float_codes as codes
from quantline.checkpoints.layouts.compressed_tensors.schemes import FP8, MXFP4, MXFP8, NVFP4, SCHEMES
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.quantization_config import describe, quantization_of
from quantline.checkpoints.safetensors_file import numpy_dtype, write_safetensors
from quantline.core.errors import CheckpointError

PYTHON = interpreter("llmcompressor")
F8 = numpy_dtype("F8_E4M3")


def as_f8(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(np.uint8)).view(F8).reshape(array.shape)


def random_codes(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """All bytes but the two of NaN."""
    found = random.integers(0, 254, shape).astype(np.uint8)
    return np.where(found >= 127, found + 1, found).astype(np.uint8)


def tensors_of(preset: str, rows: int, columns: int, seed: int, spread: float = 2.0) -> dict[str, Any]:
    """A linear of random codes; scales spread over many orders of magnitude."""
    random = np.random.default_rng(seed)
    scheme = SCHEMES[preset]
    found: dict[str, Any] = {}
    for suffix, spec in LAYOUTS[scheme.layout].specs((columns, rows), LinearSpec(8, -1), Storage()).items():
        if spec.dtype == "F8_E4M3":
            found[suffix] = as_f8(random_codes(random, spec.shape))
        elif suffix.startswith("weight_packed"):
            found[suffix] = random.integers(0, 256, spec.shape).astype(np.uint8)
        elif spec.dtype == "U8":
            found[suffix] = random.integers(127 - int(8 * spread), 127 + int(8 * spread), spec.shape).astype(np.uint8)
        else:
            found[suffix] = np.exp2(random.normal(0, spread, spec.shape)).astype(np.float32)
    return found


def read(preset: str, tensors: dict[str, Any]) -> np.ndarray:
    scheme = SCHEMES[preset]
    return LAYOUTS[scheme.layout].dequantize(tensors, bits=scheme.bits, group_size=scheme.group_size)


def section(preset: str, **changes: Any) -> dict[str, Any]:
    scheme = SCHEMES[preset]
    found = describe(scheme.layout, bits=scheme.bits, group_size=scheme.group_size, symmetric=True)
    found["config_groups"]["group_0"].update(changes)
    return found


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": config}))
    if tensors:
        write_safetensors(folder / "model.safetensors", tensors)
    return folder


# What the library makes of our tensors and our section; in float32, before its rounding to bfloat16.
LIBRARY = """
import json, sys, numpy, torch
from pathlib import Path
from safetensors.torch import load_file
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
for folder in map(Path, sys.argv[1:]):
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**section)
    scheme = config.config_groups["group_0"]
    preset = preset_name_to_scheme(folder.name.split("-")[0], ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(scheme, part), getattr(preset, part)
        plain = {} if ours is None else ours.model_dump()
        known = {} if theirs is None else theirs.model_dump()
        differ = {key for key in {*plain, *known} if plain.get(key) != known.get(key)} - {"observer", "observer_kwargs"}
        differ -= {key for key in differ if plain.get(key) is None and key in ("zp_dtype",)}
        assert not differ, (folder.name, part, {key: (plain.get(key), known.get(key)) for key in differ})
    compressor = BaseCompressor.get_value_from_registry(config.format)
    state = {name.removeprefix("a.0."): one for name, one in load_file(folder / "model.safetensors").items()}
    weight = compressor.decompress(state, scheme)["weight"]
    numpy.save(folder / "out.npy", weight.float().numpy())
"""


@pytest.mark.toolchain("llmcompressor")
def test_weights_and_sections_are_those_of_the_library(tmp_path: Path) -> None:
    """Its section is read as its preset; its weights are ours, at 4 bits up to its rounding to bfloat16."""
    folders = {}
    for preset, scheme in SCHEMES.items():
        for seed, (rows, columns) in enumerate([(1, 32), (64, 96), (200, 320), (129, 160)]):
            tensors = {f"a.0.{name}": one for name, one in tensors_of(preset, rows, columns, seed).items()}
            folder = written(tmp_path / f"{preset}-{seed}", section(preset), tensors)
            assert quantization_of(folder).layout == scheme.layout
            folders[folder] = dict(iter_dequantized(folder))["a.0.weight"]
    subprocess.run([PYTHON, "-c", LIBRARY, *folders], check=True)
    for folder, ours in folders.items():
        theirs = np.load(folder / "out.npy")
        assert ours.shape == theirs.shape
        # Here the library rounds scales to bfloat16, and the product.
        coarse = SCHEMES[folder.name.split("-")[0]].format == NVFP4
        same = np.abs(ours - theirs) <= np.abs(ours) * 2.0**-7 if coarse else ours == theirs
        assert same.all(), (folder.name, int((~same).sum()), ours[~same][:3], theirs[~same][:3])


@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_a_weight_is_its_codes_value_times_its_scale(preset: str, rows: int, blocks: int, seed: int) -> None:
    """By one weight at a time, in double precision."""
    columns = 32 * blocks
    tensors = tensors_of(preset, rows, columns, seed, spread=10.0)
    weight, scheme = read(preset, tensors), SCHEMES[preset]
    random = np.random.default_rng(seed)
    for _ in range(20):
        row, column = int(random.integers(rows)), int(random.integers(columns))
        if scheme.bits == 8:
            value = float(codes.E4M3[tensors["weight"].view(np.uint8)[row, column]])
        else:
            byte = int(tensors["weight_packed"][row, column // 2])
            value = float(codes.E2M1[byte >> 4 if column % 2 else byte & 15])
        scales = tensors["weight_scale"]
        if scheme.format == FP8:
            place = {"tensor": (0,), "channel": (row, 0), "block": (row // 128, column // 128)}[scheme.strategy]
            scale = float(scales[place])
        elif scheme.format == NVFP4:
            scale = float(codes.E4M3[scales.view(np.uint8)[row, column // 16]]) / float(
                tensors["weight_global_scale"][0]
            )
        else:
            scale = 2.0 ** (int(scales[row, column // 32]) - 127)
        assert abs(weight[row, column] - value * scale) <= abs(value * scale) * 2.0**-22 + 1e-45


def test_values_of_codes_are_those_of_the_standards() -> None:
    assert codes.E4M3[[0, 1, 0x08, 0x38, 0x7E, 0x80, 0xB8]].tolist() == [0, 2.0**-9, 2.0**-6, 1, 448, 0, -1]
    assert np.isnan(codes.E4M3[[0x7F, 0xFF]]).all()
    assert np.isfinite(np.delete(codes.E4M3, [0x7F, 0xFF])).all()
    assert codes.E8M0[[0, 127, 254]].tolist() == [2.0**-127, 1, 2.0**127]
    assert np.isnan(codes.E8M0[255])
    packed = np.array([[0x17, 0x9F]], np.uint8)
    assert codes.halves(packed).tolist() == [[6, 0.5, -6, -0.5]]


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "NVFP4"])
def test_a_nan_code_is_a_nan_weight_and_nothing_else(preset: str) -> None:
    tensors = tensors_of(preset, 4, 64, 0)
    name = "weight_scale" if preset == "NVFP4" else "weight"
    raw = tensors[name].view(np.uint8).copy()
    raw[2, 1] = 0x7F
    weight = read(preset, {**tensors, name: as_f8(raw)})
    expected = np.zeros((4, 64), bool)
    expected[2, 16 : 32 if preset == "NVFP4" else 2] = preset == "NVFP4"
    expected[2, 1] |= preset != "NVFP4"
    assert np.array_equal(np.isnan(weight), expected)


def test_blocks_at_the_edges_are_cut() -> None:
    tensors = {
        "weight": as_f8(np.full((130, 200), 0x38)), "weight_scale": np.array([[1, 2], [3, 4]], np.float32),
    }  # fmt: skip
    weight = read("FP8_BLOCK", tensors)
    assert weight[127, [127, 128, 199]].tolist() == [1, 2, 2]
    assert weight[129, [127, 128, 199]].tolist() == [3, 4, 4]


@pytest.mark.parametrize(
    ("preset", "change", "fact"),
    [
        ("FP8_DYNAMIC", {"weight": np.zeros((4, 64), np.int8)}, "stores F8_E4M3"),
        ("FP8_DYNAMIC", {"weight_scale": np.ones((3, 1), np.float32)}, "weight_scale has shape"),
        ("FP8_BLOCK", {"weight_scale": np.ones((2, 1), np.float32)}, "weight_scale has shape"),
        ("NVFP4", {"weight_global_scale": np.zeros(1, np.float32)}, "must be one positive number"),
        ("NVFP4", {"weight_global_scale": np.array([np.inf], np.float32)}, "must be one positive number"),
        ("MXFP4", {"weight_scale": np.zeros((4, 1), np.uint8)}, "weight_scale has shape"),
        ("FP8_DYNAMIC", {"weight": as_f8(np.zeros((4, 64, 1)))}, "must be a matrix"),
        ("MXFP8", {"weight": as_f8(np.zeros(256))}, "must be a matrix"),
        ("MXFP4", {"weight_packed": np.zeros((0, 32), np.uint8)}, "must be a matrix"),
        ("FP8_DYNAMIC", {"weight_scale": np.ones(0, np.float32)}, "weight_scale has shape"),
        ("FP8_DYNAMIC", {"weight_scale": np.ones((4, 1, 1), np.float32)}, "weight_scale has shape"),
        ("MXFP8", {"weight_zero_point": np.zeros(1, np.uint8)}, "does not have: weight_zero_point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(preset: str, change: dict[str, Any], fact: str) -> None:
    with pytest.raises(FormatError, match=fact):
        read(preset, {**tensors_of(preset, 4, 64, 0), **change})


def test_schemes_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    for changes, fact in [
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64}}, "known are FP8_DYNAMIC"),
        ({"input_activations": {"num_bits": 8, "type": "float", "strategy": "channel"}}, "known are FP8_DYNAMIC"),
        ({"targets": ["model.a"]}, "one group for Linear"),
        ({"targets": 4}, "one group for Linear"),
    ]:
        with pytest.raises(CheckpointError, match=fact):
            quantization_of(written(tmp_path, section("FP8_DYNAMIC", **changes)))
    with pytest.raises(CheckpointError, match="all linears alike"):
        describe(SCHEMES["FP8"].layout, bits=4, group_size=-1, symmetric=True)


def test_what_a_layout_weighs_is_what_is_written() -> None:
    for preset in SCHEMES:
        sizes = LAYOUTS[SCHEMES[preset].layout].bytes_of((320, 200), LinearSpec(8, -1), Storage())
        assert sizes.total == sum(one.nbytes for one in tensors_of(preset, 200, 320, 0).values())


def test_widths_that_groups_do_not_fill_are_faults() -> None:
    for preset, width, wrong in [
        ("NVFP4", 40, True),
        ("NVFP4", 48, False),
        ("MXFP8", 48, True),
        ("FP8_BLOCK", 192, True),  # of its inputs; the library and vLLM 0.32 refuse it, too
        ("FP8_BLOCK", 256, False),
        ("FP8_DYNAMIC", 40, False),
    ]:
        scheme = SCHEMES[preset]
        found = LAYOUTS[scheme.layout].faults((width, 64), LinearSpec(scheme.bits, scheme.group_size), Storage())
        assert bool(found) == wrong, (preset, width)
    assert {scheme.format for scheme in SCHEMES.values()} == {FP8, NVFP4, MXFP4, MXFP8}


def test_scales_of_a_cache_in_fp8_are_the_servers_alone(tmp_path: Path) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    tensors = {f"a.0.self_attn.q_proj.{name}": one for name, one in tensors_of("FP8_DYNAMIC", 32, 64, 0).items()}
    scales = {f"a.0.self_attn.{name}_scale": np.ones(1, np.float32) for name in "kv"}
    folder = written(tmp_path, {**section("FP8_DYNAMIC"), "kv_cache_scheme": cache}, {**tensors, **scales})
    assert [name for name, _ in iter_dequantized(folder)] == ["a.0.self_attn.q_proj.weight"]
    written(tmp_path, {**section("FP8_DYNAMIC"), "kv_cache_scheme": {**cache, "type": "int"}})
    with pytest.raises(CheckpointError, match=r"with kv_cache_scheme .* one fixed scale a layer"):
        quantization_of(tmp_path)
