"""Memory that a server needs besides the weights. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
# Tokens that vLLM computes at a time by default (0.32.0, EngineArgs), on GPUs smaller than LARGE_GPU and on larger ones.
BATCHED_TOKENS, BATCHED_TOKENS_LARGE, LARGE_GPU = 2048, 8192, 70 * GIB


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


def kv_cache(config: Mapping[str, Any], bytes_per_value: int = 2) -> KvCache:
    """The attention cache of a model: keys and values of every layer's key-value heads, or MLA's shared latent.

    Sliding windows count where the config uses them: for all layers, for those that `layer_types` names, or from
    `max_window_layers` on (Qwen2). MLA keeps `kv_lora_rank + qk_rope_head_dim` values per token and layer
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
    """Memory that serving needs besides weights and cache while it computes `tokens` at a time.

    Two residual streams, queries and attention output, and the MLP's two inner products, at two bytes per value, and the
    logits of `batch` sequences in float32, twice (logits and probabilities). An estimate that replaces the server's own
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
