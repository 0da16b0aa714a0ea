"""Which block type each tensor of a GGUF file gets: the mixtures of llama.cpp's `llama-quantize`.

A mixture such as Q4_K_M names the type of most tensors, and gives others more or fewer bits, by what they are, by their
layer and by how many query heads share a key. A row that is no multiple of 256 gets a type with blocks of 32 in its place,
which has more bits. So the name says little about the bits of a small model. Source: `llama_tensor_get_type` and its
neighbours in src/llama-quant.cpp of llama.cpp 0c1e57098; equal to that program's files, tensor by tensor
(`tests/checkpoints/layouts/gguf/test_mixtures.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES

# mixture -> its number in `general.file_type`, and the type of most tensors
MIXTURES: Mapping[str, tuple[int, str]] = {
    "Q8_0": (7, "Q8_0"), "Q6_K": (18, "Q6_K"), "Q5_K_M": (17, "Q5_K"), "Q5_K_S": (16, "Q5_K"), "Q5_1": (9, "Q5_1"),
    "Q5_0": (8, "Q5_0"), "Q4_K_M": (15, "Q4_K"), "Q4_K_S": (14, "Q4_K"), "Q4_1": (3, "Q4_1"), "Q4_0": (2, "Q4_0"),
    "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"), "Q3_K_L": (13, "Q3_K"), "Q3_K_M": (12, "Q3_K"),
    "Q3_K_S": (11, "Q3_K"), "IQ3_M": (27, "IQ3_S"), "IQ3_S": (26, "IQ3_S"), "IQ3_XS": (22, "IQ3_S"),
    "IQ3_XXS": (23, "IQ3_XXS"), "Q2_K": (10, "Q2_K"), "Q2_K_S": (21, "Q2_K"), "IQ2_M": (29, "IQ2_S"),
    "IQ2_S": (28, "IQ2_XS"), "IQ2_XS": (20, "IQ2_XS"), "IQ2_XXS": (19, "IQ2_XXS"), "IQ1_M": (31, "IQ1_M"),
    "IQ1_S": (24, "IQ1_S"),
}  # fmt: skip
# Those that need an importance matrix, whatever the shapes.
_VERY_LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
_NEED_WEIGHTS = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
NEEDS_IMATRIX = (*_VERY_LOW, "IQ3_XXS", "IQ3_XS", "Q2_K_S")
# What rows that are no multiple of 256 get.
_SMALLER = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d+)\.")
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Traits:
    """What of a model decides about types: its architecture and numbers, as llama.cpp knows them.

    imatrix: whether there is an importance matrix.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    imatrix: bool = False

    @property
    def shared(self) -> int:
        """Query heads that share a key."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def of_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70 billion: 80 layers, of certain families."""
        grouped = self.architecture == "llama" and self.heads != self.kv_heads
        return self.layers == 80 and (grouped or self.architecture == "qwen2")


@dataclass
class _State:
    mixture: str
    model: Traits
    tied: bool
    attention: int
    seen: dict[str, int] = field(default_factory=dict)

    def next(self, what: str) -> int:
        """The number of tensors of a kind before this one."""
        before = self.seen.get(what, 0)
        self.seen[what] = before + 1
        return before


def in_order(names: list[str]) -> list[str]:
    """Names in the order in which `llama-quantize` takes and writes them."""
    found = {name: _LAYER.match(name) for name in names}
    layers = {name: int(one[1]) if one else -1 for name, one in found.items()}
    return sorted(names, key=lambda name: (layers[name], name))


def quantizes(name: str, sizes: int) -> bool:
    """Whether a tensor with this number of sizes is quantized at all."""
    kept = ("_norm.weight", "ffn_gate_inp.weight")
    return sizes >= 2 and name.endswith("weight") and not any(part in name for part in kept)


def types(mixture: str, shapes: Mapping[str, tuple[int, ...]], model: Traits) -> dict[str, str]:
    """The type of each tensor that is quantized; `F16` where no block fits a row.

    Args:
        mixture: a key of `MIXTURES`.
        shapes: all tensors of the model by llama.cpp's names, shapes as in NumPy, rows last.
        model: what decides besides.
    """
    names = in_order([name for name, shape in shapes.items() if quantizes(name, len(shape))])
    attention = sum(_kind(name) == "attn_v" for name in shapes)
    state = _State(mixture, model, HEAD not in shapes, attention)
    return {name: _fitting(_wanted(state, name, shapes[name][-1]), shapes[name][-1]) for name in names}


def _fitting(kind: str, wide: int) -> str:
    if wide % BLOCK_TYPES[kind].weights:
        kind = _SMALLER.get(kind, kind)
    return "F16" if wide % BLOCK_TYPES[kind].weights else kind


def requires_imatrix(name: str, kind: str, mixture: str) -> bool:
    """Whether a tensor of this type is garbage without an importance matrix."""
    if name in (EMBEDDINGS, HEAD):
        return False
    return kind in _NEED_WEIGHTS or (kind == "Q2_K" and mixture == "Q2_K_S")


def _kind(name: str) -> str:
    if name in (HEAD, EMBEDDINGS):
        return "head" if name == HEAD else "embeddings"
    for part in ("attn_qkv", "attn_kv_b", "attn_v", "attn_k", "attn_q", "attn_output"):
        if f"{part}.weight" in name:
            return "attn_v" if part in ("attn_qkv", "attn_kv_b") else part
    return next((part for part in ("ffn_up", "ffn_gate", "ffn_down") if part in name), "other")


def _wanted(state: _State, name: str, wide: int) -> str:
    kind, usual = _kind(name), MIXTURES[state.mixture][1]
    if kind == "head" or (kind == "embeddings" and state.tied):
        return _of_head(state.mixture, usual, wide)
    if kind == "embeddings":
        return _of_embeddings(state.mixture, usual)
    if state.mixture in _VERY_LOW:
        return _very_low(state, kind, usual)
    if kind == "attn_v":
        return _of_values(state, usual)
    if kind == "attn_output":
        return _of_output(state, usual)
    if kind in ("attn_k", "attn_q"):
        return _of_keys(state, kind, usual)
    return _of_ffn(state, kind, name, usual) if kind.startswith("ffn") else usual


def _of_head(mixture: str, usual: str, wide: int) -> str:
    if wide % BLOCK_TYPES[usual].weights:
        return "Q8_0"
    if mixture in _VERY_LOW or mixture == "IQ3_XXS":
        return "Q5_K"
    return usual if usual == "Q8_0" else "Q6_K"


def _of_embeddings(mixture: str, usual: str) -> str:
    if mixture in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    return "IQ3_S" if mixture in ("IQ2_S", "IQ2_M", "IQ3_XXS") else usual


def _very_low(state: _State, kind: str, usual: str) -> str:
    model, better = state.model, "IQ3_S" if state.mixture in ("IQ2_S", "IQ2_M") else "Q2_K"
    if kind == "attn_v":
        return "Q4_K" if model.shared >= 4 or model.experts >= 4 else better
    if kind == "attn_k" and model.experts == 8:
        return "Q4_K"
    if kind == "ffn_down":
        return better if state.next(kind) < model.layers // 8 else usual
    if kind == "attn_output":
        if model.experts == 8:
            return "Q5_K"
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(state.mixture, usual)
    return usual


def _more(layer: int, layers: int) -> bool:
    """Whether a layer is one that gets more bits: the first and last eighth, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _of_values(state: _State, usual: str) -> str:
    model, mixture, number = state.model, state.mixture, state.next("attn_v")
    four = model.shared >= 4
    kind = usual
    if mixture == "Q2_K":
        kind = "Q4_K" if four else "Q3_K"
    elif mixture == "IQ3_XXS":
        kind = "Q4_K" if four else "IQ3_XXS" if model.imatrix else "IQ3_S"
    elif mixture == "IQ3_M" or (mixture in ("Q2_K_S", "IQ3_XS", "IQ3_S") and four):
        kind = "Q4_K"
    elif mixture == "Q3_K_M":
        kind = "Q5_K" if number < 2 else "Q4_K"
    elif mixture == "Q3_K_L" or (mixture in ("IQ4_NL", "IQ4_XS") and four) or (mixture == "Q4_K_S" and number < 4):
        kind = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _more(number, state.attention):
        kind = "Q6_K"
    if model.of_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if model.experts == 8 else kind


def _of_keys(state: _State, kind: str, usual: str) -> str:
    if kind == "attn_k" and state.model.experts == 8:
        return "Q8_0"
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(state.mixture, usual)


def _of_output(state: _State, usual: str) -> str:
    if state.model.experts == 8:
        five = (
            "Q2_K",
            "IQ3_XS",
            "IQ3_XXS",
            "Q3_K_S",
            "Q3_K_M",
            "IQ4_NL",
            "Q4_K_S",
            "Q4_K_M",
            "IQ3_S",
            "IQ3_M",
            "IQ4_XS",
        )
        return "Q5_K" if state.mixture in five else usual
    better = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    return better.get(state.mixture, usual)


def _of_ffn(state: _State, kind: str, name: str, usual: str) -> str:
    model, mixture, number = state.model, state.mixture, state.next(kind)
    found = _LAYER.match(name)
    if model.experts > 1 and found:
        number = int(found[1])
    layers = model.layers
    if kind != "ffn_down":
        inner = layers // 8 <= number < 7 * layers // 8
        return "IQ3_XXS" if mixture == "IQ3_XS" and inner else usual
    first = number < layers // 8
    if mixture == "Q2_K":
        return "Q3_K"
    if mixture == "Q2_K_S":
        return "Q4_K" if first else usual
    if mixture == "IQ3_XXS":
        return usual if model.imatrix else "Q4_K" if first else "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if number < layers // 16 else "Q4_K"
    if mixture == "IQ3_M":
        return "Q4_K" if first or (model.experts == 8 and _more(number, layers)) else usual
    if mixture == "Q3_K_L":
        return "Q5_K"
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more(number, layers) else usual
    if mixture in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if first and not model.imatrix else usual
    if mixture == "Q4_K_S":
        return "Q5_K" if first else usual
    if mixture in ("Q4_0", "Q5_0"):
        # Without an importance matrix, Q4_1 and Q5_1 go wrong there.
        return ("Q4_1" if mixture == "Q4_0" else "Q5_1") if first and model.imatrix else usual
    return usual
