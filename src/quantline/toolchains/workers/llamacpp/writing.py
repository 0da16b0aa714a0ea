"""Quantizes a GGUF file as `llama-quantize` does: its types, its order, its function, and its header by llama.cpp itself."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES
from quantline.checkpoints.layouts.gguf.header import GgufHeader, GgufTensor, read_gguf
from quantline.checkpoints.layouts.gguf.mixtures import (
    MIXTURES,
    Traits,
    in_order,
    requires_imatrix,
    types,
)
from quantline.checkpoints.safetensors_file import SafetensorsFile, TensorInfo, to_float32
from quantline.toolchains.protocol import JobError, Reporter
from quantline.toolchains.workers.llamacpp.library import library, quantized

_ALIGNMENT = 32
_F16 = 1
# Rows that a thread quantizes at a time: a million weights.
_CHUNK = 1 << 20

Importance = Mapping[str, NDArray[np.float32]]


class _FromFile(ctypes.Structure):
    """`gguf_init_params`."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


def traits_of(header: GgufHeader, imatrix: bool) -> Traits:
    """What of a file's model decides about types."""
    heads = header.number("attention.head_count")
    return Traits(
        header.architecture, header.number("block_count"), heads, header.number("attention.head_count_kv", heads),
        header.number("expert_count"), imatrix,
    )  # fmt: skip


def quantize_file(
    source: Path, out: Path, mixture: str, importance: Importance | None, *, threads: int, report: Reporter
) -> dict[str, str]:
    """Write the quantized file of a float one.

    Args:
        source: in float32, float16 or bfloat16.
        out: the file that is written.
        mixture: a key of `MIXTURES`.
        importance: tensor -> float32 (columns,), how much the error of a column counts; None for all alike.
        threads: that quantize rows at a time; the result does not depend on it.
        report: gets the number of tensors done, of all, and a name.

    Returns:
        tensor -> type, of those that were quantized.

    Raises:
        JobError: the mixture needs an importance matrix and there is none.
    """
    header = read_gguf(source)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    chosen = types(mixture, shapes, traits_of(header, importance is not None))
    for name, kind in chosen.items():
        if requires_imatrix(name, kind, mixture) and name not in (importance or {}):
            raise JobError(
                f"method.type={mixture}: {name} in {kind} needs an importance matrix; set method.imatrix=true"
            )
    numbers = {name: BLOCK_TYPES[kind].number if kind in BLOCK_TYPES else _F16 for name, kind in chosen.items()}
    names = in_order(list(shapes))
    with out.open("wb") as file, ThreadPoolExecutor(threads) as pool:
        file.write(_meta(source, names, numbers, MIXTURES[mixture][0]))
        for done, name in enumerate(names):
            report(done, len(names), name)
            written = 0
            for piece in _pieces(header, name, chosen.get(name), (importance or {}).get(name), pool):
                file.write(piece)
                written += len(piece)
            file.write(bytes(-written % _ALIGNMENT))
    return chosen


def _meta(source: Path, names: list[str], numbers: Mapping[str, int], file_type: int) -> bytes:
    """The header of the new file: the settings of the old one, the types of the tensors."""
    lib = library()
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _FromFile]
    tensors = ctypes.c_void_p()
    old = lib.gguf_init_from_file(str(source).encode(), _FromFile(True, ctypes.pointer(tensors)))
    new = lib.gguf_init_empty()
    try:
        lib.gguf_set_kv(new, old)
        lib.gguf_set_val_u32(new, b"general.quantization_version", 2)
        lib.gguf_set_val_u32(new, b"general.file_type", file_type)
        for name in names:
            lib.gguf_add_tensor(new, lib.ggml_get_tensor(tensors, name.encode()))
            if name in numbers:
                lib.gguf_set_tensor_type(new, name.encode(), numbers[name])
        size = lib.gguf_get_meta_size(new)
        data = (ctypes.c_uint8 * size)()
        lib.gguf_get_meta_data(new, data)
        return bytes(data)
    finally:
        lib.gguf_free(new)
        lib.gguf_free(old)
        lib.ggml_free(tensors)


def _pieces(
    header: GgufHeader, name: str, kind: str | None, scale: NDArray[np.float32] | None, pool: ThreadPoolExecutor
) -> Iterator[bytes]:
    tensor = header.tensors[name]
    stored = _stored(header, tensor)
    if kind is None:
        yield stored.tobytes()
        return
    columns = stored.shape[-1]
    rows = stored.reshape(-1, columns)
    step = max(1, _CHUNK // columns)
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]

    def blocks(part: NDArray[Any]) -> bytes:
        wide = to_float32(part)
        if kind not in BLOCK_TYPES:
            return wide.astype(np.float16).tobytes()
        block = BLOCK_TYPES[kind]
        return quantized(block.number, wide, scale, columns // block.weights * block.nbytes).tobytes()

    yield from pool.map(blocks, parts)


def _stored(header: GgufHeader, tensor: GgufTensor) -> NDArray[Any]:
    if not isinstance(tensor.kind, str):
        raise JobError(f"{header.path.name}: is quantized already; give the float model")
    info = TensorInfo(tensor.kind, tensor.shape, tensor.offset, tensor.nbytes)
    return SafetensorsFile(header.path, {"": info}).view("")
