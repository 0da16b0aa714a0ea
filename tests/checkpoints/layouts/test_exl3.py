"""EXL3: every number of bits and code book as GPTQModel's own reader says, and a whole model by the reference engine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from checkout_paths import DEMO_MODEL, interpreter
from hypothesis import given
from hypothesis import strategies as st

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.float_view import FloatView, iter_dequantized
from quantline.checkpoints.layouts import FormatError, exl3
from quantline.checkpoints.quantization_config import describe, quantization_of
from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
from quantline.core.errors import CheckpointError
from quantline.serving.rules import Target, checkpoint_facts, verdict
from quantline.toolchains.toolchain import worker_environment

BOOKS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D, "3inst": None}
# Gives weights (in, out), transforms in float32.
LIBRARY = """
import sys, numpy, torch
from gptqmodel.nn_modules.exllamav3_torch import ExllamaV3TorchLinear
given, found = numpy.load(sys.argv[1]), {}
for key in {name.rpartition("/")[0] for name in given.files}:
    own = {name.rpartition("/")[2]: torch.from_numpy(given[name]) for name in given.files if name.startswith(key + "/")}
    wide, high = len(own["suh"]), len(own["svh"])
    linear = ExllamaV3TorchLinear.from_tensors(in_features=wide, out_features=high, name=key, tensors=own)
    found[key] = linear.get_weight_tensor(torch.float32).numpy()
numpy.savez(sys.argv[2], **found)
"""
# The logits of a folder by the reference engine, and by transformers of a float folder.
LOGITS = """
import sys, numpy, torch
from pathlib import Path
from quantline.toolchains.workers.reference.skeleton import Skeleton
from transformers import AutoModelForCausalLM
ids = torch.arange(40).reshape(1, 40) * 7
read, plain, out = sys.argv[1:]
skeleton = Skeleton(Path(read))
with torch.no_grad():
    numpy.savez(out, engine=skeleton.fill_all()(ids).logits, plain=AutoModelForCausalLM.from_pretrained(plain)(ids).logits)
"""


def linear(
    wide: int, high: int, bits: int, book: str = "mcg", *, seed: int = 0, spread: float = 1.0
) -> dict[str, np.ndarray]:
    """Random codes; every bit pattern is one."""
    random = np.random.default_rng([seed, bits])
    tensors = {
        "trellis": random.integers(-(2**15), 2**15, (wide // 16, high // 16, 16 * bits)).astype(np.int16),
        "suh": (random.normal(size=wide) * spread).astype(np.float16),
        "svh": (random.normal(size=high) * spread).astype(np.float16),
    }
    if BOOKS[book] is not None:
        tensors[book] = np.array(BOOKS[book], np.uint32).view(np.int32).reshape(())
    return tensors


@pytest.mark.toolchain("gptqmodel")
def test_weights_are_what_the_library_says_for_all_bits_and_code_books(tmp_path):
    cases = {
        f"{bits}/{book}/{spread}": linear(256, 384, bits, book, spread=spread)
        for bits in exl3.BITS for book in BOOKS for spread in (1e-4, 1.0, 100.0)
    }  # fmt: skip
    np.savez(tmp_path / "in.npz", **{f"{key}/{name}": one for key, own in cases.items() for name, one in own.items()})
    command = [interpreter("gptqmodel"), "-c", LIBRARY, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, check=True, capture_output=True, env=worker_environment(1))
    expected = np.load(tmp_path / "out.npz")
    for key, tensors in cases.items():
        found = exl3.dequantize(tensors, bits=int(key[0]))
        assert found.shape == (384, 256)
        assert found.dtype == np.float32
        limit = 1e-6 * np.abs(expected[key]).max()  # sums of 128 in float32
        np.testing.assert_allclose(found, expected[key].T, rtol=0, atol=limit, err_msg=key)


@given(st.sampled_from(exl3.BITS), st.integers(0, 255), st.integers(0, 15))
def test_a_bit_of_the_ring_changes_the_codes_whose_sixteen_bits_hold_it_and_no_others(bits, word, bit):
    words = np.zeros((1, 16 * bits), np.int16)
    word %= 16 * bits
    words.view(np.uint16)[0, word] = 1 << bit
    codes = exl3._codes(words, bits)[0]
    place = (word ^ 1) * 16 + 15 - bit  # pairs of words are exchanged; the highest bit is first
    ends = (np.arange(256) + 1) * bits
    behind = (ends - 1 - place) % (256 * bits)
    np.testing.assert_array_equal(codes, np.where(behind < 16, 1 << np.minimum(behind, 15), 0))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"trellis": np.zeros((8, 8, 63), np.int16)}, r"trellis is int16 \(8, 8, 63\): EXL3 with 4 bits has"),
        ({"trellis": np.zeros((8, 8, 64), np.int32)}, "trellis is int32"),
        ({"trellis": np.zeros((4, 8, 64), np.int16)}, "of 64 inputs and 128 outputs: EXL3 needs multiples of 128"),
        ({"suh": np.zeros(127, np.float16)}, "suh has shape"), ({"svh": np.zeros((1, 128), np.float16)}, "svh has shape"),
        ({"mcg": np.array(7, np.int32)}, "mcg is .7.: the multiplier of this code book is 0xcbac1fed"),
        ({"mul1": np.array(0x83DCD12D, np.uint32)}, "mcg and mul1 are both there"),
        ({"su": np.zeros(8, np.int16)}, "tensors this layout does not have: su"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_of_the_format_are_refused(change, fact):
    with pytest.raises(FormatError, match=fact):
        exl3.dequantize({**linear(128, 128, 4), **change}, bits=4)


def folder_of(place: Path, *, bits: float = 3.5) -> Path:
    """The demo with random linears in EXL3, of 2 to 6 bits, and an output layer of its own, though it is tied."""
    place.mkdir()
    checkpoint = Checkpoint.open(DEMO_MODEL)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["tie_word_embeddings"]
    tensors = {}
    for name in checkpoint.names:
        layer, values = name.removesuffix(".weight"), checkpoint.tensor(name)
        if values.ndim == 2 and "embed" not in name:
            own = linear(values.shape[1], values.shape[0], 2 + len(tensors) % 4, seed=len(tensors), spread=0.15)
            tensors.update({f"{layer}.{suffix}": one for suffix, one in own.items()})
        else:
            tensors[name] = np.array(values)
    high, wide = checkpoint.info("model.embed_tokens.weight").shape
    tensors.update({f"lm_head.{suffix}": one for suffix, one in linear(wide, high, 6, "mul1", spread=0.15).items()})
    write_safetensors(place / "model.safetensors", tensors)
    section = {"quant_method": "exl3", "version": "1.6.5", "bits": bits, "head_bits": 6}
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, place / name)
    return place


def test_each_linear_has_the_bits_that_its_trellis_says(tmp_path):
    folder = folder_of(tmp_path / "in")
    info = quantization_of(folder)
    assert {info.of(layer).bits for layer in info.overrides} == {2, 3, 4, 5, 6}
    assert info.of("lm_head").bits == 6
    view = FloatView.open(folder)
    assert view.shape("lm_head.weight") == view.shape("model.embed_tokens.weight")
    assert len(view.quantized) == 36


@pytest.mark.parametrize("bits", [None, "3", 0, 9, True])
def test_a_description_without_bits_is_refused(tmp_path, bits):
    with pytest.raises(CheckpointError, match="EXL3 has 1 to 8"):
        quantization_of(folder_of(tmp_path / "in", bits=bits))


def test_it_is_kept_by_a_conversion_and_neither_written_nor_served(tmp_path):
    folder = folder_of(tmp_path / "in")
    (tmp_path / "out").mkdir()
    proof = convert(folder, tmp_path / "out", ConvertConfig(target="auto"))
    assert (proof.rewritten, proof.counts["linears"]) == (False, 36)
    with pytest.raises(CheckpointError, match="EXL3 is read and kept, not written"):
        describe("exl3", bits=4, group_size=-1, symmetric=True)
    for device in ("cpu", "cuda"):
        found = verdict(Target("vllm", "0.32.0", device, "bfloat16"), checkpoint_facts(folder))
        assert (found.supported, found.rule_id) == (False, "exl3")


@pytest.mark.toolchain("vllm")
def test_the_server_knows_no_such_method():
    code = "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as known; print(*known)"
    done = subprocess.run(
        [interpreter("vllm"), "-c", code], capture_output=True, text=True, check=True, env=worker_environment(1)
    )
    known = done.stdout.splitlines()[-1].split()
    assert "gptq" in known
    assert "exl3" not in known


@pytest.mark.toolchain("reference")
def test_the_reference_engine_scores_it_with_its_own_output_layer(tmp_path):
    folder, plain = folder_of(tmp_path / "in"), tmp_path / "plain"
    plain.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, "dtype": "float32"}))
    write_safetensors(plain / "model.safetensors", {name: values.copy() for name, values in iter_dequantized(folder)})
    command = [interpreter("reference"), "-c", LOGITS, folder, plain, tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=worker_environment(1))
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["engine"], found["plain"], rtol=0, atol=1e-4 * np.abs(found["plain"]).max())
