"""The parameters of a model in a GGUF file, by transformers' names and in transformers' order."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_files import gguf_bytes, small_model

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES, dequantized
from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.checkpoints.layouts.gguf.names import FAMILIES, MODEL_TYPES, parameters, stored_name
from quantline.core.errors import CheckpointError

LAYER = "model.layers.0"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does with the rows of q and k of its llama family."""
    split = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def test_a_folder_is_opened_by_its_file_under_the_names_of_transformers(tmp_path):
    checkpoint = Checkpoint.open(small_model(tmp_path, kind="Q4_K"))
    assert f"{LAYER}.self_attn.q_proj.q4_k" in checkpoint.names
    assert "model.embed_tokens.q8_0" in checkpoint.names
    assert "model.norm.weight" in checkpoint.names
    info = checkpoint.info(f"{LAYER}.mlp.down_proj.q4_k")
    assert (info.dtype, info.shape) == ("U8", (256, 144))


@pytest.mark.parametrize(("part", "heads"), [("attn_q", 4), ("attn_k", 2)])
def test_rows_of_q_and_k_are_put_back_into_the_order_of_the_model(tmp_path, part, heads):
    folder = small_model(tmp_path, kind="Q4_0")
    tensor = read_gguf(folder / "model.gguf").tensors[f"blk.0.{part}.weight"]
    data = (folder / "model.gguf").read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    stored = dequantized(BLOCK_TYPES["Q4_0"], np.frombuffer(data, np.uint8).reshape(tensor.shape[0], -1))
    view = FloatView.open(folder)
    read = view.values(f"{LAYER}.self_attn.{part[-1]}_proj.weight")
    np.testing.assert_array_equal(permuted(read, heads), stored)
    assert not np.array_equal(read, stored)


def test_a_family_without_that_order_is_read_as_it_is(tmp_path):
    llama, qwen = (small_model(tmp_path / name, architecture=name) for name in ("llama", "qwen2"))
    name = f"{LAYER}.self_attn.q_proj.weight"
    mine, other = FloatView.open(qwen).values(name), FloatView.open(llama).values(name)
    np.testing.assert_array_equal(permuted(other, 4), mine)


def test_what_was_added_to_norms_is_taken_off(tmp_path):
    for name, expected in (("gemma", 1.0), ("llama", 2.0)):
        view = FloatView.open(small_model(tmp_path / name, architecture=name))
        assert (view.values(f"{LAYER}.input_layernorm.weight") == expected).all()


def test_experts_that_are_stacked_are_linears_of_their_own(tmp_path):
    settings = {"general.architecture": "qwen3moe"}
    kind = BLOCK_TYPES["Q8_0"]
    rows = np.random.default_rng(0).integers(0, 100, (3, 4, kind.nbytes * 2), dtype=np.uint8)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(settings, {"blk.1.ffn_up_exps.weight": ("Q8_0", rows)}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == [f"model.layers.1.mlp.experts.{number}.up_proj.q8_0" for number in range(3)]
    np.testing.assert_array_equal(checkpoint.tensor(checkpoint.names[2]), rows[2])


def test_factors_of_rotary_embeddings_are_no_parameters(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, {"rope_freqs.weight": np.ones(4, np.float32)}))
    assert parameters(read_gguf(path)) == {}


@pytest.mark.parametrize(
    ("architecture", "tensor", "message"),
    [("mamba", "output.weight", "GGUF of the architecture 'mamba': known are llama"),
     ("llama", "blk.0.other.weight", r"tensor blk.0.other.weight of llama is not known; use safetensors instead")],
)  # fmt: skip
def test_what_is_not_known_is_refused(tmp_path, architecture, tensor, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": architecture}, {tensor: np.ones((2, 4), np.float32)}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_two_files_in_a_folder_are_refused(tmp_path):
    small_model(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 2 GGUF files: leave one of them"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("architecture", sorted(set(MODEL_TYPES.values())))
def test_the_name_in_the_file_follows_from_the_module(tmp_path, architecture):
    assert architecture in FAMILIES
    stored = {
        module: stored_name(architecture, module)
        for module in (
            "model.embed_tokens",
            "lm_head",
            f"{LAYER}.self_attn.o_proj",
            f"{LAYER}.mlp.down_proj",
            f"{LAYER}.x",
        )
    }
    assert stored == {
        "model.embed_tokens": "token_embd.weight", "lm_head": "output.weight",
        f"{LAYER}.self_attn.o_proj": "blk.0.attn_output.weight", f"{LAYER}.mlp.down_proj": "blk.0.ffn_down.weight",
        f"{LAYER}.x": None,
    }  # fmt: skip
