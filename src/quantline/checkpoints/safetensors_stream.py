"""Writes safetensors files tensor by tensor: first the header, from dtypes and shapes, then each tensor at its offset.

Tensors may be written in any order and from several threads; equal tensors give equal bytes in any order.
Tensors that are written can be read back while others are still missing.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import (
    SafetensorsFile,
    TensorInfo,
    numpy_dtype,
    read_header,
    read_into,
    safetensors_dtype,
)
from quantline.core.errors import CheckpointError
from quantline.core.files import replaced


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(numpy_dtype(self.dtype).itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize


@dataclass
class StreamedFile:
    """A file that is being written, under its temporary name. `infos` is its header on the disk."""

    path: Path
    descriptor: int
    infos: Mapping[str, TensorInfo]
    written: set[str] = field(default_factory=set)

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Write a tensor at its offset.

        Raises:
            CheckpointError: the header has no such tensor of this dtype and shape, or it was written before.
        """
        info = self._expected(name, safetensors_dtype(array.dtype), array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._write(data, info.offset)

    def put_chunks(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterator[Any]) -> None:
        """Write a tensor from consecutive chunks of its bytes; raises what `put` raises."""
        info = self._expected(name, dtype, shape)
        position = info.offset
        for chunk in chunks:
            self._write(memoryview(chunk), position)
            position += len(chunk)
        if position != info.offset + info.nbytes:
            raise CheckpointError(f"{self.path}: {name} has {position - info.offset} of {info.nbytes} bytes")

    def get(self, name: str) -> NDArray[Any]:
        """A copy of a tensor in the file."""
        return SafetensorsFile(self.path, self.infos).read(name)

    def get_part(self, name: str, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a tensor from `start` on."""
        read_into(self.descriptor, target, self.infos[name].offset + start)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, in chunks."""
        return SafetensorsFile(self.path, self.infos).chunks(name)

    def _expected(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.infos.get(name)
        if info is None or (info.dtype, info.shape) != (dtype, tuple(shape)):
            planned = "nothing" if info is None else f"{info.dtype} {info.shape}"
            raise CheckpointError(f"{self.path}: {name} is {dtype} {tuple(shape)}, but {planned} was planned")
        if name in self.written:
            raise CheckpointError(f"{self.path}: {name} is written twice")
        self.written.add(name)
        return info

    def _write(self, data: memoryview, position: int) -> None:
        while data:
            count = os.pwrite(self.descriptor, data, position)
            data, position = data[count:], position + count


@contextmanager
def streamed(path: Path, specs: Mapping[str, TensorSpec]) -> Iterator[StreamedFile]:
    """A file for the tensors of `specs`; it appears under its name only if the block succeeds.

    Raises:
        CheckpointError: a tensor of `specs` was not written.
        OSError: the disk failed; nothing is left behind.
    """
    with replaced(path) as temporary, temporary.open("w+b") as file:
        header = _header(specs)
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
        file.flush()
        made = StreamedFile(temporary, file.fileno(), read_header(temporary))
        yield made
        missing = sorted(set(specs) - made.written)
        if missing:
            raise CheckpointError(f"{path}: {missing[0]} was planned but not written")


@contextmanager
def flushed(file: StreamedFile) -> Iterator[threading.Event]:
    """A thread that flushes the file to the disk whenever the event is set, so that little is left for the end.

    Raises:
        OSError: a flush failed; a later flush need not report it again.
    """
    news, errors, ended = threading.Event(), [], False

    def work() -> None:
        while news.wait() and not ended:
            news.clear()
            try:
                os.fdatasync(file.descriptor)
            except OSError as error:
                errors.append(error)
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield news
    finally:
        ended = True
        news.set()
        thread.join()
    if errors:
        raise errors[0]


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    # Widest items first, so that every tensor is aligned.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(specs, key=lambda name: (-specs[name].itemsize, name)):
        spec = specs[name]
        offsets = [position, position + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
