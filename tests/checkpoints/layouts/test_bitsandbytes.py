from __future__ import annotations

import json

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import Checkpoint, CheckpointError, quantization_of, quantized_layers
from quantline.checkpoints.checkpoint import write_safetensors as write
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import FormatError
from quantline.checkpoints.layouts import bitsandbytes as layout

NAMES = ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]


def state(**changes):
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64], **changes}
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)


def four_bits(codes, absmax, kind="nf4", **changes):
    """A layer of (2, 64) codes with one block a row."""
    codes = np.asarray(codes, dtype=np.uint8).reshape(-1)
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": np.asarray(absmax, dtype=np.float32),
        "weight.quant_map": layout.TABLES[kind],
        f"weight.quant_state.bitsandbytes__{kind}": state(quant_type=kind, **changes),
    }


@pytest.fixture
def codes():
    return np.random.default_rng(0).integers(0, 16, (2, 64))


def test_the_first_weight_is_in_the_high_half_of_a_byte():
    layer = four_bits(np.zeros(128), [2.0, 3.0])
    layer["weight"][0, 0] = 0xF7
    weight = layout.dequantize(layer, bits=4)
    assert weight.shape == (2, 64)
    assert weight[0, :3].tolist() == [2.0, 0.0, -2.0]
    assert weight[1, 0] == -3.0


@pytest.mark.parametrize(("kind", "code", "value"), [("nf4", 14, 0.7229568), ("fp4", 3, 1.0), ("fp4", 9, -0.0625 / 12)])
def test_a_weight_is_its_table_value_times_its_blocks_scale(kind, code, value):
    weight = layout.dequantize(four_bits(np.full(128, code), [1.0, 4.0], kind), bits=4)
    np.testing.assert_allclose(weight, np.array([[value], [4 * value]]) * np.ones((1, 64)), rtol=1e-6)


def test_blocks_run_over_rows_and_the_last_one_may_be_short():
    codes = np.full(3 * 50, 15)
    layer = four_bits(codes, [1.0, 2.0, 3.0], shape=[3, 50])
    expected = np.repeat([1.0, 2.0, 3.0], 64)[:150].reshape(3, 50)
    np.testing.assert_array_equal(layout.dequantize(layer, bits=4), expected)


def test_scales_that_were_quantized_again_are_table_times_scale_plus_offset(codes):
    layer = four_bits(codes, [0, 0], nested_blocksize=256, nested_dtype="float32", nested_offset=0.25)
    layer["weight.absmax"] = np.array([3, 200], dtype=np.uint8)
    layer["weight.nested_absmax"] = np.array([0.5], dtype=np.float32)
    layer["weight.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    scales = np.linspace(-1, 1, 256, dtype=np.float32)[[3, 200]] * np.float32(0.5) + np.float32(0.25)
    expected = layout.NF4[codes] * scales[:, None]
    np.testing.assert_array_equal(layout.dequantize(layer, bits=4), expected)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_products_are_rounded_to_the_dtype_of_the_state(codes, dtype, bits):
    exact = layout.dequantize(four_bits(codes, [0.3, 0.7]), bits=4)
    rounded = layout.dequantize(four_bits(codes, [0.3, 0.7], dtype=dtype), bits=4)
    assert not np.array_equal(rounded, exact)
    nonzero = exact != 0
    assert (np.abs(rounded - exact)[nonzero] <= np.abs(exact)[nonzero] * 2.0**-bits).all()
    mantissas, _ = np.frexp(rounded)
    np.testing.assert_array_equal(mantissas * 2**bits, np.rint(mantissas * 2**bits))


def test_ties_go_to_the_even_bfloat16():
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(layout._bfloat16(values), np.float32([1.0, 1 + 2.0**-6, -1.0, 0.0]))


def test_large_layers_come_in_pieces_of_the_same_values(codes, monkeypatch):
    whole = layout.dequantize(four_bits(codes, [0.3, 0.7]), bits=4)
    monkeypatch.setattr(layout, "_PIECE", 64)
    np.testing.assert_array_equal(layout.dequantize(four_bits(codes, [0.3, 0.7]), bits=4), whole)


def test_an_8_bit_weight_is_its_code_times_its_rows_scale_over_127():
    layer = {"weight": np.array([[127, -64], [1, 0]], dtype=np.int8), "SCB": np.array([2.0, 127.0], dtype=np.float32)}
    layer["weight_format"] = np.array(0, dtype=np.uint8)
    np.testing.assert_allclose(layout.dequantize(layer, bits=8), [[2.0, -128 / 127], [1.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight.quant_map": layout.FP4}, "quant_map is not the table of nf4"),
        ({"weight.absmax": np.zeros(3, np.float32)}, "weight.absmax has shape"),
        ({"weight.absmax": np.zeros(2, np.uint8)}, "weight.nested_absmax is missing"),
        ({"weight": np.zeros((63, 1), np.uint8)}, "weight has shape"),
        ({NAMES[3]: state(dtype="int8")}, "has the dtype 'int8'"),
        ({NAMES[3]: state(quant_type="af4")}, "has the type 'af4'"),
        ({NAMES[3]: state(blocksize=0)}, "has the block size 0"),
        ({NAMES[3]: state(shape=[128])}, "has the shape"),
        ({NAMES[3]: np.zeros(4, np.uint8)}, "cannot be read"),
        ({"weight.nested_absmax": np.ones(1, np.float32)}, "are incomplete"),
    ],
)
def test_a_layer_that_does_not_fit_together_is_refused(codes, changes, message):
    with pytest.raises(FormatError, match=message):
        layout.dequantize({**four_bits(codes, [1, 1]), **changes}, bits=4)


def test_weights_by_columns_are_refused():
    layer = {"weight": np.zeros((2, 2), np.int8), "SCB": np.ones(2, np.float32), "weight_format": np.ones((), np.uint8)}
    with pytest.raises(FormatError, match="weight_format is not 0"):
        layout.dequantize(layer, bits=8)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_config_is_read_back(bits):
    config = layout.describe(
        bits=bits, block_size=128, quant_type="fp4", double_quant=True, modules_to_not_convert=["lm_head"]
    )
    assert layout.parse(config) == (bits, 128 if bits == 4 else -1, ("lm_head",))


def test_configs_of_other_writers_have_blocks_of_64():
    assert layout.parse({"_load_in_4bit": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}) == (4, 64, ())


@pytest.mark.parametrize("config", [{}, {"load_in_4bit": True, "load_in_8bit": True}])
def test_a_config_of_no_width_or_two_is_refused(config):
    with pytest.raises(FormatError, match="either load_in_4bit or load_in_8bit"):
        layout.parse(config)


@pytest.fixture
def folder(tmp_path, codes):
    tensors = {f"layers.0.up.{suffix}": part for suffix, part in four_bits(codes, [1.0, 2.0]).items()}
    tensors |= {"layers.0.up.bias": np.ones(2, np.float16), "embed.weight": np.ones((4, 4), np.float16)}
    write(tmp_path / "model.safetensors", tensors)
    config = layout.describe(bits=4, block_size=64, quant_type="nf4", double_quant=False, modules_to_not_convert=[])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return tmp_path


def test_a_checkpoint_gives_its_weights_under_their_float_names(folder, codes):
    found = dict(iter_dequantized(folder))
    assert sorted(found) == ["embed.weight", "layers.0.up.bias", "layers.0.up.weight"]
    np.testing.assert_array_equal(found["layers.0.up.weight"], layout.NF4[codes] * np.float32([[1.0], [2.0]]))
    assert quantization_of(folder).method == "bitsandbytes"


def test_a_packed_layer_without_its_config_is_refused(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is packed, but config\.json says float"):
        list(iter_dequantized(folder))


def test_a_layer_that_lacks_a_tensor_is_named(folder, codes):
    tensors = {f"layers.0.up.{suffix}": part for suffix, part in four_bits(codes, [1.0, 2.0]).items()}
    del tensors["layers.0.up.weight.quant_map"], tensors[f"layers.0.up.{NAMES[3]}"]
    write(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.0\.up lacks weight\.quant_map, weight\.quant_state"):
        quantized_layers(Checkpoint.open(folder), quantization_of(folder))


def test_a_config_without_packed_layers_is_refused(folder):
    write(folder / "model.safetensors", {"embed.weight": np.ones((4, 4), np.float16)})
    with pytest.raises(CheckpointError, match="says bitsandbytes, but no linear is packed"):
        list(iter_dequantized(folder))
