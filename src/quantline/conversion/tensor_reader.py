"""The tensors of a folder, by name, read by several threads.

They are read into memory of their own, so that what a conversion holds is what it works on; the codes of large linears
alone are mapped, one linear a thread, since every byte that need not be copied counts there.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import TensorInfo, numpy_dtype
from quantline.checkpoints.safetensors_stream import CHUNK, read_into
from quantline.core.errors import CheckpointError

# Bytes that are looked through at a time: they stay in the processor's cache between the one look and the other.
_PASS = 1 << 18


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder; read by several threads."""

    folder: Path
    files: Mapping[str, str]  # tensor -> file
    infos: Mapping[str, TensorInfo]
    _open: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor in memory of its own."""
        info = self.infos[name]
        data = np.empty(info.nbytes, dtype=np.uint8)
        read_into(self._descriptor(name), data.data, info.offset)
        return data.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def mapped(self, name: str) -> NDArray[Any]:
        """A tensor as it lies in its file, not to be written to; it is unmapped with the last reference to the array.

        Raises:
            CheckpointError: the file ends inside it.
        """
        info, descriptor = self.infos[name], self._descriptor(name)
        if os.fstat(descriptor).st_size < info.offset + info.nbytes:
            raise CheckpointError(f"{self.files[name]}: ends inside {name}: fetch or write it again")
        start = info.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(descriptor, info.offset + info.nbytes - start, prot=mmap.PROT_READ, offset=start)
        data = np.frombuffer(pages, dtype=np.uint8, offset=info.offset - start)
        return data.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, piece by piece."""
        info, descriptor = self.infos[name], self._descriptor(name)
        for start in range(0, info.nbytes, CHUNK):
            piece = bytearray(min(CHUNK, info.nbytes - start))
            read_into(descriptor, memoryview(piece), info.offset + start)
            yield piece

    def extremes(self, name: str) -> tuple[int, int]:
        """The least and the largest value of an int8 tensor that is not empty."""
        low, high = 127, -128
        values = self.mapped(name).reshape(-1)
        for start in range(0, values.size, _PASS):
            part = values[start : start + _PASS]
            low, high = min(low, int(part.min())), max(high, int(part.max()))
        return low, high

    def close(self) -> None:
        """Close the files; reading opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _descriptor(self, name: str) -> int:
        file = self.files[name]
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._open[file]
