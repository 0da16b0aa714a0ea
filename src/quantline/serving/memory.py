"""Memory that a server needs besides the weights. All sizes are bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.model_config import dimensions, language_config
from quantline.config.serve import ProcessConfig

GIB = 2**30
# A vLLM process without weights and cache: 1.0 GiB was seen on a CPU; on a GPU it also has a context and graphs.
OVERHEAD_BYTES = {"cpu": 3 * GIB // 2, "cuda": 4 * GIB}
# Of the memory that is available, what servers may take beside others.
MEMORY_SHARE = 0.8
# Tokens that vLLM computes at a time by default (0.32.0, EngineArgs), on GPUs smaller than LARGE_GPU and on larger ones.
BATCHED_TOKENS, BATCHED_TOKENS_LARGE, LARGE_GPU = 2048, 8192, 70 * GIB


@dataclass(frozen=True)
class Limits:
    """What the options of a server's process say of its memory.

    max_num_seqs: sequences at a time; others wait and hold no cache. batched_tokens: computed at a time; None is vLLM's own.
    block_size: tokens of a block of the cache, of which a sequence has whole ones. offloaded: bytes of each GPU's weights
    that stay in main memory. kv_offloaded: bytes of main memory for the cache.
    """

    max_num_seqs: int | None = None
    batched_tokens: int | None = None
    block_size: int | None = None
    offloaded: int = 0
    kv_offloaded: int = 0

    @classmethod
    def of(cls, process: ProcessConfig) -> Limits:
        """Those of a configuration."""
        return cls(
            process.max_num_seqs, process.max_num_batched_tokens, process.block_size,
            round(process.cpu_offload_gib * GIB), round(process.kv_offload_gib * GIB),
        )  # fmt: skip

    def cached(self, context: int, batch: int) -> tuple[int, int]:
        """The tokens and sequences that the cache holds where `batch` sequences of `context` tokens are asked for."""
        block = self.block_size or 1
        return -(-context // block) * block, min(batch, self.max_num_seqs or batch)


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


# Bytes of a kept value; beside each head's values of a token, `per_token_head` keeps a float32 scale.
KEPT_BYTES = {"auto": 2.0, "nvfp4": 0.5 + 1 / 16, "int4_per_token_head": 0.5}
_SCALE = 4


def kv_cache(config: Mapping[str, Any], dtype: str = "auto") -> KvCache | None:
    """The attention cache of a model: keys and values of every layer's key-value heads, or MLA's shared latent.

    Sliding windows count where the config uses them: for all layers, for those that `layer_types` names, or from
    `max_window_layers` on (Qwen2). MLA keeps `kv_lora_rank + qk_rope_head_dim` values per token and layer
    (arXiv:2405.04434). Recurrent layers are counted as if they kept keys and values. None if the config does not say how
    many layers and heads there are, or the model has no heads (Mamba). dtype: `serve.kv_cache_dtype`.
    """
    own, numbers = language_config(config), dimensions(config)
    size, scale = KEPT_BYTES.get(dtype, 1.0), _SCALE if dtype.endswith("_per_token_head") else 0
    if numbers.layers is None:
        return None
    if own.get("kv_lora_rank"):
        kept = int(own["kv_lora_rank"]) + int(own.get("qk_rope_head_dim") or 0)
        return KvCache(numbers.layers * math.ceil(kept * size + scale))
    if numbers.kv_heads is None or numbers.head_size is None:
        return None
    a_layer = 2 * numbers.kv_heads * math.ceil(numbers.head_size * size + scale)
    window = own.get("sliding_window")
    windowed = 0
    if window and own.get("use_sliding_window", True):
        types = own.get("layer_types")
        if types:
            windowed = sum(kind == "sliding_attention" for kind in types)
        else:
            windowed = numbers.layers - min(numbers.layers, int(own.get("max_window_layers") or 0))
    full = KvCache(a_layer * (numbers.layers - windowed))
    return replace(full, window_bytes_per_token=a_layer * windowed, window=int(window)) if windowed and window else full


def activations(config: Mapping[str, Any], batch: int, tokens: int = BATCHED_TOKENS) -> int | None:
    """Memory that serving needs besides weights and cache while it computes `tokens` at a time.

    Two residual streams, queries and attention output, and the MLP's two inner products, at two bytes per value, and the
    logits of `batch` sequences in float32, twice (logits and probabilities). An estimate that replaces the server's own
    profiling run. An MLP of unknown width counts as four times the hidden one. None if the config gives no widths.
    """
    numbers = dimensions(config)
    if numbers.hidden is None or numbers.vocabulary is None:
        return None
    inner = numbers.inner or 4 * numbers.hidden
    return tokens * (4 * numbers.hidden + 2 * inner) * 2 + 2 * batch * numbers.vocabulary * 4


def tensor_bytes(checkpoint: Path) -> int:
    """Bytes of all tensors of a checkpoint."""
    opened = Checkpoint.open(checkpoint)
    return sum(opened.info(name).nbytes for name in opened.names)


def server_bytes(checkpoint: Path, process: ProcessConfig, device: str) -> float:
    """What a server of a checkpoint takes, about. device: `cpu` or `cuda`."""
    return 1.2 * tensor_bytes(checkpoint) + (process.kv_cache_gib or 0) * GIB + OVERHEAD_BYTES[device]
