"""Safetensors files written tensor by tensor: the header first, from dtypes and shapes alone, then each tensor at its place.

Tensors may come in any order and from several threads; equal tensors give equal bytes whatever the order.
What has come can be read back from the file while the rest is still on its way.
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
    """A tensor to come: safetensors dtype and shape."""

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
    """A file in the making, under its temporary name. `infos` is its header as it stands on the disk."""

    path: Path
    descriptor: int
    infos: Mapping[str, TensorInfo]
    written: set[str] = field(default_factory=set)

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Write a tensor to its place.

        Raises:
            CheckpointError: it was not announced, not with this dtype and shape, or has come before.
        """
        info = self._expected(name, safetensors_dtype(array.dtype), array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._write(data, info.offset)

    def put_chunks(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterator[Any]) -> None:
        """Write a tensor that comes as consecutive pieces of its bytes; refuses what `put` refuses."""
        info = self._expected(name, dtype, shape)
        position = info.offset
        for chunk in chunks:
            self._write(memoryview(chunk), position)
            position += len(chunk)
        if position != info.offset + info.nbytes:
            raise CheckpointError(f"{self.path}: {name} came with {position - info.offset} of {info.nbytes} bytes")

    def get(self, name: str) -> NDArray[Any]:
        """Read a tensor from the file into memory of its own."""
        return SafetensorsFile(self.path, self.infos).read(name)

    def get_part(self, name: str, start: int, target: memoryview) -> None:
        """Read the bytes of a tensor from `start` on, as many as `target` holds."""
        read_into(self.descriptor, target, self.infos[name].offset + start)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, piece by piece."""
        return SafetensorsFile(self.path, self.infos).chunks(name)

    def _expected(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.infos.get(name)
        if info is None or (info.dtype, info.shape) != (dtype, tuple(shape)):
            planned = "nothing" if info is None else f"{info.dtype} {info.shape}"
            raise CheckpointError(f"{self.path}: {name} comes as {dtype} {tuple(shape)}, planned was {planned}")
        if name in self.written:
            raise CheckpointError(f"{self.path}: {name} comes twice")
        self.written.add(name)
        return info

    def _write(self, data: memoryview, position: int) -> None:
        while data:
            count = os.pwrite(self.descriptor, data, position)
            data, position = data[count:], position + count


@contextmanager
def streamed(path: Path, specs: Mapping[str, TensorSpec]) -> Iterator[StreamedFile]:
    """A file to put the announced tensors into; it appears under its name when the block ends well, and else not at all.

    Raises:
        CheckpointError: a tensor that was announced did not come.
        OSError: the disk; nothing is left behind.
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
            raise CheckpointError(f"{path}: {missing[0]} was planned and not written")


@contextmanager
def flushed(file: StreamedFile) -> Iterator[threading.Event]:
    """A thread that brings to the disk what has come whenever the event is set, so that little is left for the end.

    Raises:
        OSError: the disk refused something; a file's last flush need not say so again.
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
