"""The header of a GGUF file, version 2 or 3: its settings and where its tensors are. No weights are read.

Little-endian: the magic `GGUF`, a version, the numbers of tensors and of settings; each setting as a name, a type and a
value; each tensor as a name, its sizes (the row first), `ggml_type` and an offset from the start of the data, which begins
at the next multiple of `general.alignment`. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from quantline.checkpoints.layouts.gguf.blocks import FLOAT_TYPES, NUMBERED, BlockType
from quantline.core.errors import CheckpointError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_STRING, _ARRAY = 8, 9
# type of a setting -> format of `struct`
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8}
# Of a header; a vocabulary of 256 thousand tokens with its merges takes 10 MB.
_MOST = 1 << 30


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        kind: its block type, or the safetensors dtype of a tensor that is not quantized.
        shape: as in NumPy, rows last.
        offset: of its first byte in the file.
        nbytes: its size.
    """

    kind: BlockType | str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A file's settings and tensors. Of an array among the settings, only its length is kept."""

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.settings.get("general.architecture", ""))

    def number(self, key: str, default: int = 0) -> int:
        """A setting of the architecture, such as `attention.head_count`."""
        value = self.settings.get(f"{self.architecture}.{key}", default)
        return int(value) if isinstance(value, int | float) else default


class _Cursor:
    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.place = path, data, 0

    def refuse(self, fact: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {fact}: the file is truncated or corrupt; fetch or write it again")

    def number(self, form: str) -> Any:
        size = struct.calcsize(form)
        if self.place + size > len(self.data):
            self.refuse("its header ends early")
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += size
        return value

    def skip(self, size: int) -> None:
        if size < 0 or self.place + size > len(self.data):
            self.refuse("its header ends early")
        self.place += size

    def text(self) -> str:
        size = self.number("Q")
        start = self.place
        self.skip(size)
        try:
            return bytes(self.data[start : self.place]).decode()
        except UnicodeDecodeError:
            self.refuse("a name is no text")

    def setting(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            self.refuse(f"a setting has the type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self) -> str:
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.refuse(f"a list has values of the type {kind}")
        return f"{count} values"


def read_gguf(path: Path) -> GgufHeader:
    """Read and check a header.

    Raises:
        CheckpointError: the file is no GGUF, is inconsistent, is one of several parts, or has a type that is not known.
    """
    import mmap

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path}: is no GGUF file; fetch it again, or give a folder of safetensors")
            mapped = mmap.mmap(file.fileno(), min(size, _MOST), access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    with mapped, memoryview(mapped) as data:
        return _parsed(path, data, size)


def _parsed(path: Path, data: memoryview, size: int) -> GgufHeader:
    cursor = _Cursor(path, data)
    cursor.skip(4)
    version, tensors, count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: GGUF of version {version} in little-endian: 2 and 3 can be read; convert it again"
        )
    settings = {cursor.text(): cursor.setting() for _ in range(count)}
    if int(settings.get("split.count") or 0) > 1:
        raise CheckpointError(
            f"{path}: is one of {settings['split.count']} parts; join them with llama-gguf-split --merge"
        )
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = int(settings.get("general.alignment", 32))
    if alignment <= 0:
        cursor.refuse(f"general.alignment is {alignment}")
    start = -(-cursor.place // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if name in found:
            cursor.refuse(f"tensor {name} is there twice")
        kind = NUMBERED.get(number) or FLOAT_TYPES.get(number)
        if kind is None:
            raise CheckpointError(f"{path}: tensor {name} has the type {number}, which is not known; use another type")
        nbytes = _bytes(cursor, name, kind, shape)
        if start + offset + nbytes > size:
            cursor.refuse(f"tensor {name} ends at byte {start + offset + nbytes}, the file at {size}")
        found[name] = GgufTensor(kind, shape, start + offset, nbytes)
    return GgufHeader(path, settings, found)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, count = cursor.text(), cursor.number("I")
    if count > 4:
        cursor.refuse(f"tensor {name} has {count} sizes")
    sizes = [cursor.number("Q") for _ in range(count)]
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _bytes(cursor: _Cursor, name: str, kind: BlockType | str, shape: tuple[int, ...]) -> int:
    if isinstance(kind, str):
        return math.prod(shape) * _SIZES[kind]
    if not shape or shape[-1] % kind.weights:
        cursor.refuse(
            f"tensor {name} of {kind.name} has rows of {shape[-1] if shape else 0}, no multiple of {kind.weights}"
        )
    return math.prod(shape) // kind.weights * kind.nbytes
