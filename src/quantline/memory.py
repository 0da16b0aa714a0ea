"""Memory, counted from headers and configs before anything is computed. All sizes are bytes.

What a checkpoint holds is exact: its layout's tensors, one by one. The rest are models of what libraries do, each with
its source, meant to tell what cannot fit from what can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantline.checkpoint import Checkpoint
from quantline.formats.awq_gemv import zeros_width
from quantline.linears import LM_HEAD, Width

GIB = 2**30
# What is neither weights, cache nor activations: a CUDA context, kernels, the allocator's slack. An assumption.
GPU_CONTEXT = GIB
# Tokens that vLLM computes at a time when it serves, by default (0.32.0, EngineArgs), and the GPU that is a large one.
BATCHED_TOKENS, BATCHED_TOKENS_LARGE, LARGE_GPU = 2048, 8192, 70 * GIB


@dataclass(frozen=True)
class LinearBytes:
    """One packed linear without its bias: codes, scales, zero points, and the rest (group index, shape)."""

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    other: int = 0

    def __add__(self, more: LinearBytes) -> LinearBytes:
        return LinearBytes(
            self.codes + more.codes, self.scales + more.scales, self.zeros + more.zeros, self.other + more.other
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.codes + self.scales + self.zeros + self.other


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights.

    float_source: as the float model's files hold them. packed: the quantized linears. left_float: everything else, at two
    bytes a value: embeddings (tied ones once), norms, biases, linears that are not quantized. quantized_parameters and
    parameters: values in either.
    """

    float_source: int
    packed: LinearBytes
    left_float: int
    quantized_parameters: int
    parameters: int

    @property
    def total(self) -> int:
        """What the quantized checkpoint holds."""
        return self.packed.total + self.left_float

    @property
    def bits_per_quantized_weight(self) -> float:
        """Of a quantized value, its share of scales and zero points included."""
        return 8 * self.packed.total / self.quantized_parameters if self.quantized_parameters else 16.0

    @property
    def bits_per_weight(self) -> float:
        """Over all values of the model, quantized or not."""
        return 8 * self.total / self.parameters


@dataclass(frozen=True)
class KvCache:
    """bytes_per_token: of layers that keep all tokens; window_bytes_per_token: of those that keep the last `window`."""

    bytes_per_token: int
    window_bytes_per_token: int = 0
    window: int | None = None

    def bytes(self, context: int, batch: int) -> int:
        """For `batch` sequences of `context` tokens."""
        kept = context if self.window is None else min(context, self.window)
        return batch * (context * self.bytes_per_token + kept * self.window_bytes_per_token)


def linear_bytes(
    layout: str, in_features: int, out_features: int, width: Width, *, symmetric: bool, double_quant: bool = True
) -> LinearBytes:
    """What a layout's tensors take for one linear (see `quantline.formats` for their shapes); float16 scales.

    layout: a key of `formats.LAYOUTS`, msmodelslim or bitsandbytes (whose JSON of some hundred bytes a linear is not
    counted). symmetric: for compressed-tensors, which then leaves zero points out; double_quant: for bitsandbytes.
    """
    bits, values = width.bits, in_features * out_features
    groups = 1 if width.group_size == -1 else -(-in_features // width.group_size)
    scales = groups * out_features * 2
    if layout in ("gptq", "gptq_v2"):
        return LinearBytes(values * bits // 8, scales, groups * out_features * bits // 8, in_features * 4)
    if layout == "awq_gemm":
        return LinearBytes(values // 2, scales, groups * out_features // 2)
    if layout == "awq_gemv":
        words = zeros_width(in_features, width.group_size)
        return LinearBytes(values // 2, out_features * 8 * words * 2, out_features * words * 4)
    if layout == "compressed_tensors":
        fields = 32 // bits
        zeros = 0 if symmetric else -(-out_features // fields) * groups * 4
        return LinearBytes(out_features * -(-in_features // fields) * 4, scales, zeros, 16)
    if layout == "compressed_tensors_int":
        return LinearBytes(values, out_features * 2)
    if layout == "bitsandbytes":
        if bits == 8:
            return LinearBytes(values, out_features * 4, other=1)
        blocks = -(-values // width.group_size)
        if not double_quant:
            return LinearBytes(values // 2, blocks * 4, other=16 * 4)
        return LinearBytes(values // 2, blocks + -(-blocks // 256) * 4, other=(16 + 256) * 4)
    if layout.startswith("msmodelslim"):
        packed = bits == 4 and layout != "msmodelslim"
        return LinearBytes(values // 2 if packed else values, scales, scales)
    raise ValueError(f"no layout named {layout}")


def weights_of(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    widths: Mapping[str, Width],
    layout: str,
    *,
    symmetric: bool,
    double_quant: bool = True,
) -> Weights:
    """The size of the checkpoint that quantizing makes, from the float model's headers; options as for `linear_bytes`."""
    packed, left, quantized, parameters, source = LinearBytes(), 0, 0, 0, 0
    for name in checkpoint.names:
        info = checkpoint.info(name)
        source += info.nbytes
        if name == f"{LM_HEAD}.weight" and config.get("tie_word_embeddings"):
            continue  # the embedding table under a second name
        values = _product(info.shape)
        parameters += values
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and layer in widths:
            wide, high = info.shape[1], info.shape[0]
            packed += linear_bytes(layout, wide, high, widths[layer], symmetric=symmetric, double_quant=double_quant)
            quantized += values
        else:
            left += values * 2
    return Weights(source, packed, left, quantized, parameters)


def kv_cache(config: Mapping[str, Any], bytes_per_value: int = 2) -> KvCache:
    """The attention cache of a model: keys and values of every layer's key-value heads, or MLA's shared latent.

    Sliding windows count where the config uses them: for all layers, for `layer_types` that say so, or from
    `max_window_layers` on (Qwen2). MLA keeps `kv_lora_rank + qk_rope_head_dim` values a token and layer
    (arXiv:2405.04434). Recurrent layers are counted as if they kept keys and values.
    """
    layers = int(_first(config, "num_hidden_layers", "n_layer"))
    heads = int(_first(config, "num_attention_heads", "n_head"))
    size = int(config.get("head_dim") or int(_first(config, "hidden_size", "n_embd")) // heads)
    if config.get("kv_lora_rank"):
        return KvCache(
            layers * (int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)) * bytes_per_value
        )
    kv_heads = int(config.get("num_key_value_heads") or heads)
    a_layer = 2 * kv_heads * size * bytes_per_value
    window = config.get("sliding_window")
    windowed = 0
    if window and config.get("use_sliding_window", True):
        types = config.get("layer_types")
        if types:
            windowed = sum(kind == "sliding_attention" for kind in types)
        else:
            windowed = layers - min(layers, int(config.get("max_window_layers") or 0))
    full = KvCache(a_layer * (layers - windowed))
    return replace(full, window_bytes_per_token=a_layer * windowed, window=int(window)) if windowed and window else full


def activations(config: Mapping[str, Any], batch: int, tokens: int = BATCHED_TOKENS) -> int:
    """What serving needs beside weights and cache while it computes `tokens` at a time.

    Two residual streams, queries and attention output, and the MLP's two inner products, at two bytes a value, and the
    logits of `batch` sequences in float32, twice (logits and probabilities). An assumption in place of the server's own
    profiling run.
    """
    hidden, inner = int(_first(config, "hidden_size", "n_embd")), int(config.get("intermediate_size") or 0)
    inner = inner or 4 * int(_first(config, "hidden_size", "n_embd"))
    return tokens * (4 * hidden + 2 * inner) * 2 + 2 * batch * int(config["vocab_size"]) * 4


def _first(config: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise KeyError(names[0])


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
