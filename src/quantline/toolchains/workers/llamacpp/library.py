"""llama.cpp's C interface in the library that xllamacpp 2026.10.11549 brings, called by ctypes.

Its structures are those of llama.h (llama.cpp b11549). Their defaults are compared with the library's own when it is loaded,
so that a library with other structures is refused and not misread.
"""

from __future__ import annotations

import ctypes as c
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.toolchains.protocol import JobError

_Floats = NDArray[np.float32]


class ModelParams(c.Structure):
    """`llama_model_params`."""

    _fields_ = [
        *((name, c.c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c.c_void_p) for name in ("tensor_split", "progress_callback", "progress_data", "kv_overrides")),
        *(
            (name, c.c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")
        ),
        ("_more", c.c_uint8 * 64),
    ]  # fmt: skip


class ContextParams(c.Structure):
    """`llama_context_params`."""

    _fields_ = [
        *(
            (name, c.c_uint32)
            for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_per_seq")
        ),
        *(
            (name, c.c_int32)
            for name in (
                "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type",
                "flash_attn_type",
            )
        ),
        *(
            (name, c.c_float)
            for name in (
                "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
                "yarn_beta_slow",
            )
        ),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        *((name, c.c_void_p) for name in ("cb_eval", "cb_eval_data")),
        *((name, c.c_int32) for name in ("type_k", "type_v")),
        # One pointer more than in the header at hand; it lies somewhere between the types and the booleans.
        *((name, c.c_void_p) for name in ("abort_callback", "abort_data", "_other")),
        *(
            (name, c.c_bool)
            for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
        ),
        ("_more", c.c_uint8 * 96),
    ]  # fmt: skip


class Batch(c.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p), ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)), ("seq_id", c.POINTER(c.POINTER(c.c_int32))), ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_ERROR = 4
_said: list[str] = []


def _keep(level: int, text: bytes, _data: Any) -> None:
    if level == _ERROR:
        _said.append(text.decode(errors="replace").strip())


_log = _LOG(_keep)  # must outlive the library's use of it


# name -> result, arguments
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (
        c.c_size_t, [c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p]
    ),
    "ggml_get_tensor": (c.c_void_p, [c.c_void_p, c.c_char_p]),
    "ggml_free": (None, [c.c_void_p]),
    "gguf_init_empty": (c.c_void_p, []),
    "gguf_set_kv": (None, [c.c_void_p, c.c_void_p]),
    "gguf_set_val_u32": (None, [c.c_void_p, c.c_char_p, c.c_uint32]),
    "gguf_add_tensor": (None, [c.c_void_p, c.c_void_p]),
    "gguf_set_tensor_type": (None, [c.c_void_p, c.c_char_p, c.c_int]),
    "gguf_get_meta_size": (c.c_size_t, [c.c_void_p]),
    "gguf_get_meta_data": (None, [c.c_void_p, c.c_void_p]),
    "gguf_free": (None, [c.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c.c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_tokenize": (
        c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool]
    ),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, ContextParams]),
    "llama_free": (None, [c.c_void_p]),
    "llama_batch_init": (Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
}  # fmt: skip


@cache
def library() -> Any:
    """The loaded library, with the types of the functions that are used here.

    Raises:
        JobError: its structures are not those of this module.
    """
    import xllamacpp  # type: ignore[import-not-found]

    (path,) = Path(xllamacpp.__file__).parent.glob("*.so")
    loaded = c.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    model, context = loaded.llama_model_default_params(), loaded.llama_context_default_params()
    # What each field is by default; one that was put in between would shift those behind it.
    known = (
        (model.n_gpu_layers, -1), (model.split_mode, 1), (model.vocab_only, False), (model.use_extra_bufts, True),
        (context.n_ctx, 512), (context.n_batch, 2048), (context.n_ubatch, 512), (context.n_seq_max, 1),
        (context.n_threads, context.n_threads_batch), (context.yarn_ext_factor, -1.0), (context.defrag_thold, -1.0),
        (context.type_k, 1), (context.type_v, 1), (context.offload_kqv, True), (context.embeddings, False),
    )  # fmt: skip
    if any(found != expected for found, expected in known):
        raise JobError("this llama.cpp has another C interface than that of b11549; use the locked environment")
    loaded.llama_backend_init()
    loaded.llama_log_set(_log, None)
    return loaded


class Llama:
    """A model of a GGUF file; create it with `opened`."""

    def __init__(self, model: int, context: int, window: int) -> None:
        self._model, self._context, self._window = model, context, window
        self._vocabulary = library().llama_model_get_vocab(model)
        self.tokens = int(library().llama_vocab_n_tokens(self._vocabulary))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text, as the model's own tokenizer makes them: with a first token if it says so.

        special: text of special tokens stands for them.
        """
        data = text.encode()
        room = len(data) + 16
        ids = (c.c_int32 * room)()
        count = library().llama_tokenize(self._vocabulary, data, len(data), ids, room, True, special)
        return [int(one) for one in ids[:count]]

    def logits(self, ids: Sequence[int]) -> _Floats:
        """The logits at every position of a window, float32 (tokens, vocabulary).

        Raises:
            JobError: llama.cpp does not compute them.
        """
        lib, count = library(), len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place] = int(token), place
                batch.n_seq_id[place], batch.logits[place] = 1, 1
                batch.seq_id[place][0] = 0
            batch.n_tokens = count
            if lib.llama_decode(self._context, batch) != 0:
                raise JobError(f"llama.cpp does not compute a window of {count} tokens: {'; '.join(_said[-3:])}")
            found = np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(count, self.tokens))
            return np.array(found)
        finally:
            lib.llama_batch_free(batch)


@contextmanager
def opened(path: Path, *, window: int = 0, threads: int = 1, exact: bool = False) -> Iterator[Llama]:
    """A model inside the block; only its vocabulary if window is 0, else for windows of so many tokens.

    exact: keys and values in float32; the server keeps them in float16.

    Raises:
        JobError: llama.cpp does not load it.
    """
    lib = library()
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = window == 0, 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise JobError(f"{path.name}: llama.cpp does not load it: {'; '.join(_said[-3:]) or 'no reason given'}")
    context = None
    try:
        if window:
            settings = lib.llama_context_default_params()
            settings.n_ctx = settings.n_batch = settings.n_ubatch = max(32, -(-window // 32) * 32)
            settings.n_threads = settings.n_threads_batch = threads
            # 0 takes as many as the batch has, which are all: every position is asked for.
            settings.n_outputs_per_seq = settings.n_ctx
            if exact:
                settings.type_k = settings.type_v = settings.flash_attn_type = 0
            context = lib.llama_init_from_model(model, settings)
            if not context:
                raise JobError(f"{path.name}: llama.cpp cannot hold {window} tokens: {'; '.join(_said[-3:])}")
        yield Llama(model, context or 0, window)
    finally:
        if context:
            lib.llama_free(context)
        lib.llama_model_free(model)


def log_probabilities(logits: _Floats, targets: Sequence[int]) -> NDArray[np.float64]:
    """Natural logarithm of each target's probability, by the logits of its position, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    found: NDArray[np.float64] = wide[np.arange(len(wide)), np.asarray(targets)] - total
    return found


def quantized(kind: int, weights: _Floats, importance: _Floats | None, nbytes: int) -> NDArray[np.uint8]:
    """Rows in blocks of a type, uint8 (rows, bytes), by llama.cpp's own function.

    Args:
        kind: `ggml_type`.
        weights: float32 (rows, columns).
        importance: float32 (columns,), how much the error of a column counts; None for all alike.
        nbytes: of a row of blocks.

    Raises:
        JobError: it wrote another number of bytes.
    """
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    rows, columns = weights.shape
    out = np.zeros((rows, nbytes), dtype=np.uint8)
    scale = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = library().ggml_quantize_chunk(
        kind, weights.ctypes.data, out.ctypes.data, 0, rows, columns, None if scale is None else scale.ctypes.data
    )
    if written != math.prod(out.shape):
        raise JobError(
            f"ggml_quantize_chunk wrote {written} bytes for {math.prod(out.shape)}: use the locked environment"
        )
    return out
