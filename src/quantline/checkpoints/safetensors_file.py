"""The safetensors format: header, dtypes, reading a tensor, atomic writing.

A file is an unsigned 64-bit little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` with an
optional ``__metadata__`` of strings, and the tensors' little-endian bytes without gaps (the safetensors format, v1).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.model_files import weight_map
from quantline.core.errors import CheckpointError
from quantline.core.files import _unique_keys, replaced

# The limit of the format itself; a corrupt length must not allocate terabytes.
MAX_HEADER_BYTES = 100_000_000

# Bytes of a tensor in memory at a time, when it is read in chunks.
CHUNK = 1 << 22

_REMEDY = "the file is truncated or corrupt; fetch or write it again"

# safetensors dtype -> (NumPy storage, name of the ml_dtypes type for arithmetic)
_DTYPES: dict[str, tuple[str, str | None]] = {
    "BOOL": ("|b1", None),
    "U8": ("|u1", None),
    "I8": ("|i1", None),
    "F8_E4M3": ("|u1", "float8_e4m3fn"),
    "F8_E5M2": ("|u1", "float8_e5m2"),
    "U16": ("<u2", None),
    "I16": ("<i2", None),
    "F16": ("<f2", None),
    "BF16": ("<u2", "bfloat16"),
    "U32": ("<u4", None),
    "I32": ("<i4", None),
    "F32": ("<f4", None),
    "U64": ("<u8", None),
    "I64": ("<i8", None),
    "F64": ("<f8", None),
}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and offset of a tensor in its file.

    Attributes:
        dtype: safetensors name, such as "F16" or "BF16".
        shape: its dimensions; () for a scalar.
        offset: first byte, from the start of the file.
        nbytes: number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a safetensors dtype.

    bfloat16 and the float8 types are those of ml_dtypes. Without that package they are one-field structured dtypes
    over the raw bits (``[("BF16", "<u2")]``): arithmetic on them fails instead of treating bits as integers,
    `to_float32` decodes bfloat16, and `write_safetensors` writes them back unchanged.
    """
    storage, extension = _DTYPES[name]
    if extension is None:
        return np.dtype(storage)
    try:
        extended: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), extension))
        return extended
    except ImportError:
        return np.dtype([(name, storage)])


@cache
def safetensors_dtype(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a NumPy dtype.

    Raises:
        CheckpointError: the format has no such dtype.
    """
    for name in _DTYPES:
        if numpy_dtype(name) == dtype:
            return name
    raise CheckpointError(f"dtype {dtype}: safetensors has no such dtype; convert the tensor first")


def to_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """The values as float32: exact for bfloat16, float16, float8 and booleans; 64-bit types may round.

    Raises:
        CheckpointError: the values are float8 and the ml_dtypes package is missing.
    """
    if safetensors_dtype(array.dtype) == "BF16":
        # bfloat16 is the upper half of a float32; shifting bits is also faster than ml_dtypes' own conversion.
        bits = array.view(np.uint16).astype(np.uint32)
        np.left_shift(bits, np.uint32(16), out=bits)
        return bits.view(np.float32)
    if array.dtype.names is not None:
        raise CheckpointError(f"{array.dtype.names[0]} tensors need the ml_dtypes package: install it")
    return array.astype(np.float32, copy=False)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check a safetensors header; the tensors themselves are not read.

    Returns:
        tensor name -> `TensorInfo`, in the order of the data.

    Raises:
        CheckpointError: the file is inconsistent.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors header: {_REMEDY}")
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size} bytes: {_REMEDY}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}): {_REMEDY}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object: {_REMEDY}")
    metadata = header.pop("__metadata__", None) or {}  # null is none, as the format's own reader takes it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a mapping of strings: {_REMEDY}")
    start = 8 + length
    infos = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position = start
    for name, info in ordered.items():
        if info.offset != position:
            raise CheckpointError(
                f"{path}: tensor {name} starts at byte {info.offset}, but the data before it ends at {position}: {_REMEDY}"
            )
        position += info.nbytes
    if position != size:
        raise CheckpointError(f"{path}: the header describes {position} bytes, but the file has {size}: {_REMEDY}")
    return ordered


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype!r}: supported are {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}: {_REMEDY}")
    nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype][0]).itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name} of {dtype} {tuple(shape)} needs {nbytes} bytes, "
            f"but its data_offsets {offsets} give {offsets[1] - offsets[0]}: {_REMEDY}"
        )
    return TensorInfo(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose tensors are read one at a time; several threads may read at once.

    `safetensors.safe_open` (0.8.0) is not used: it needs ml_dtypes for bfloat16, which workers may lack. It also copies
    every tensor, and keeps the pages that it read in memory until the file is closed.

    Attributes:
        path: the file.
        infos: its header.
    """

    path: Path
    infos: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header.

        Raises:
            CheckpointError: the file is inconsistent.
        """
        return cls(path, read_header(path))

    def view(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only array over the mapped file; the file is mapped as long as the array exists.

        Raises:
            CheckpointError: there is no such tensor, or the file has become shorter.
        """
        info = self._info(name)
        if not info.nbytes:
            data = np.empty(0, dtype=np.uint8)
            data.flags.writeable = False
        else:
            with self._opened() as descriptor:
                if os.fstat(descriptor).st_size < info.offset + info.nbytes:
                    raise CheckpointError(f"{self.path}: ends inside {name}: {_REMEDY}")
                start = info.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
                pages = mmap.mmap(descriptor, info.offset + info.nbytes - start, prot=mmap.PROT_READ, offset=start)
            data = np.frombuffer(pages, dtype=np.uint8, offset=info.offset - start)
        return data.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def read(self, name: str) -> NDArray[Any]:
        """A copy of a tensor.

        Raises:
            CheckpointError: there is no such tensor, or the file has become shorter.
        """
        info = self._info(name)
        data = np.empty(info.nbytes, dtype=np.uint8)
        with self._opened() as descriptor:
            read_into(descriptor, data.data, info.offset)
        return data.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor in chunks of `CHUNK` bytes; the last may be shorter.

        Raises:
            CheckpointError: there is no such tensor, or the file has become shorter.
        """
        info = self._info(name)
        with self._opened() as descriptor:
            for start in range(0, info.nbytes, CHUNK):
                piece = bytearray(min(CHUNK, info.nbytes - start))
                read_into(descriptor, memoryview(piece), info.offset + start)
                yield piece

    def sha256(self, name: str) -> str:
        """SHA-256 of a tensor, over ``["<dtype>", [<shape>]]`` as JSON and its bytes; its offset does not matter."""
        info = self._info(name)
        digest = hashlib.sha256(json.dumps([info.dtype, list(info.shape)]).encode())
        digest.update(self.view(name).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise CheckpointError(f"{self.path}: has no tensor {name}: check the name, or fetch the file again")
        return self.infos[name]

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}): fetch or write it again") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def read_into(descriptor: int, target: memoryview, position: int) -> None:
    """Fill `target` from a position in a file.

    Raises:
        CheckpointError: the file ends before that.
    """
    while target:
        count = os.preadv(descriptor, [target], position)
        if not count:
            raise CheckpointError("a weights file ends before its tensors do: fetch or write it again")
        target, position = target[count:], position + count


def write_safetensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file atomically; equal tensors give equal bytes.

    Args:
        path: the file; its folder exists.
        tensors: name -> array. Written one at a time, widest items first and then by name, so that every tensor is aligned.
        metadata: strings for ``__metadata__``, in addition to ``format: pt``, which loaders require.

    Raises:
        CheckpointError: the format does not allow a dtype or a name.
        OSError: the disk failed; nothing is left behind.
    """
    if "__metadata__" in tensors:
        raise CheckpointError(f"{path}: __metadata__ is not a valid tensor name: rename the tensor")
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    position = 0
    for name in names:
        array = tensors[name]
        header[name] = {
            "dtype": safetensors_dtype(array.dtype),
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replaced(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            little = np.ascontiguousarray(tensors[name])
            file.write(little.reshape(-1).view(np.uint8).data)


def read_index(index: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """File, dtype, shape and offset of every tensor, sorted by name or by file.

    Returns:
        tensor name -> file name; tensor name -> `TensorInfo`.

    Raises:
        CheckpointError: the index contradicts its shards or names files outside its folder, or a shard is missing or
            damaged.
    """
    shards = weight_map(index)
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(shards.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: shard {shard} is missing: fetch it again")
        header = read_header(index.parent / shard)
        listed = {name for name, file in shards.items() if file == shard}
        for name in sorted(listed ^ set(header)):
            fact = "lists {} in {}, which does not have it" if name in listed else "does not list {} of {}"
            raise CheckpointError(f"{index}: {fact.format(name, shard)}: their versions differ; fetch both again")
        infos.update(header)
    return {name: shards[name] for name in sorted(shards)}, infos
