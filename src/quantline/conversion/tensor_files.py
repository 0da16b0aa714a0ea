"""The tensors of a folder, by name, read by several threads.

They are read into memory of their own, not mapped, so that what a conversion holds is what it works on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.formats.container import TensorInfo, numpy_dtype
from quantline.formats.streaming import CHUNK, read_into

# Bytes that pass at a time where nothing is kept of them: they stay in the processor's cache.
_PASS = 1 << 20


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder; read by several threads."""

    folder: Path
    files: Mapping[str, str]  # tensor -> file
    infos: Mapping[str, TensorInfo]
    _open: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, name: str, part: tuple[int, int] = (0, 1), parts: int = 1) -> NDArray[Any]:
        """A tensor, or the given ones of equal parts along its first axis, in memory of its own."""
        info = self.infos[name]
        size = info.nbytes // parts
        data = np.empty(size * (part[1] - part[0]), dtype=np.uint8)
        read_into(self._descriptor(name), data.data, info.offset + size * part[0])
        return data.view(numpy_dtype(info.dtype)).reshape(-1, *info.shape[1:])

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, piece by piece."""
        info, descriptor = self.infos[name], self._descriptor(name)
        for start in range(0, info.nbytes, CHUNK):
            piece = bytearray(min(CHUNK, info.nbytes - start))
            read_into(descriptor, memoryview(piece), info.offset + start)
            yield piece

    def extremes(self, name: str) -> tuple[int, int]:
        """The least and the largest value of an int8 tensor that is not empty, read a piece at a time."""
        info, descriptor = self.infos[name], self._descriptor(name)
        buffer = np.empty(min(_PASS, info.nbytes), dtype=np.int8)
        low, high = 127, -128
        for start in range(0, info.nbytes, _PASS):
            part = buffer[: info.nbytes - start]
            read_into(descriptor, part.data.cast("B"), info.offset + start)
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
