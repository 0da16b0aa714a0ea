"""The block type of every linear before it is quantized, by the headers of the float model."""

from __future__ import annotations

from collections import Counter

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts.gguf import planned
from quantline.checkpoints.linears import linear_shapes
from quantline.checkpoints.model_config import read_config


def demo(root, **options):
    folder = root / "assets/demo/model"
    checkpoint, config = Checkpoint.open(folder), read_config(folder)
    shapes = {
        name.removesuffix(".weight"): checkpoint.info(name).shape for name in checkpoint.names if "weight" in name
    }
    return planned.specs({"type": "Q4_K_M", "imatrix": True, **options}, shapes, config), linear_shapes(
        checkpoint, config
    )


def test_rows_of_384_get_types_of_32_where_the_mixture_says_256(root):
    specs, linears = demo(root)
    assert Counter(specs[name].kind for name in linears) == {"q5_0": 28, "q8_0": 2, "q4_k": 3, "q6_k": 2}
    assert specs["model.embed_tokens"].kind == "q8_0"  # it is the output layer, too
    bits = sum(
        wide * high * {"q5_0": 5.5, "q8_0": 8.5, "q4_k": 4.5, "q6_k": 6.5625}[specs[name].kind]
        for name, (wide, high) in linears.items()
    ) / sum(wide * high for wide, high in linears.values())
    assert round(bits, 2) == 5.49


def test_norms_have_no_type_and_a_family_that_is_not_known_has_none_at_all(root):
    specs, linears = demo(root)
    assert set(specs) == {*linears, "model.embed_tokens"}
    shapes = {"model.layers.0.self_attn.q_proj": (4, 256)}
    assert planned.specs({"type": "Q4_K_M", "imatrix": True}, shapes, {"model_type": "mamba"}) == {}


def test_rows_that_no_block_fits_stay_float():
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    shapes = {"model.layers.0.self_attn.q_proj": (4, 40), "model.layers.0.mlp.up_proj": (4, 64)}
    assert set(planned.specs({"type": "Q8_0", "imatrix": False}, shapes, config)) == {"model.layers.0.mlp.up_proj"}


def test_bits_and_groups_of_a_mixture_are_those_of_most_of_its_linears():
    found = {kind: planned.usual({"type": kind}) for kind in ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ2_M")}
    assert {kind: (one.bits, one.group_size, one.kind) for kind, one in found.items()} == {
        "Q8_0": (8, 32, "q8_0"), "Q5_K_M": (5, 32, "q5_k"), "Q4_K_M": (4, 32, "q4_k"), "IQ2_M": (2, 16, "iq2_s"),
    }  # fmt: skip


def test_the_summary_counts_types_and_bits(root):
    specs, linears = demo(root)
    chosen = {name: specs[name] for name in linears}
    assert planned.summary({"type": "Q4_K_M"}, chosen, linears) == (
        "Q4_K_M is 28 x Q5_0, 3 x Q4_K, 2 x Q6_K, 2 x Q8_0 in this model's linears, 5.49 bits a weight"
    )
