"""The block types of GGUF: their sizes, and the weights that a block stands for, in NumPy.

A row of a quantized tensor is a run of blocks, each of 32 or 256 weights with one or two float16 scales. In blocks of 256,
groups of 16 or 32 have scales of 4, 6 or 8 bits, by which those are multiplied. Every function here takes blocks as an
array of records and gives float32 (blocks, weights), in the order of operations of llama.cpp's own `gguf` package, so that
both are equal in every bit. Names of fields are those of ggml-common.h (llama.cpp, format version 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.gguf.codebooks import book

Blocks = NDArray[Any]
Floats = NDArray[np.float32]

# IQ4_NL and IQ4_XS; MXFP4's are E2M1, doubled.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)
# Of eight signs, seven are stored; the last makes the number of negative ones even.
_SIGNS = np.array([value | (value.bit_count() % 2) << 7 for value in range(128)], dtype=np.uint8)
_DELTA = np.float32(0.125)


def _shifts(codes: NDArray[Any], bits: int, count: int) -> NDArray[Any]:
    """Codes of `bits` bits out of each integer of (..., n), the lowest first: (..., count, n)."""
    by = (bits * np.arange(count)).astype(codes.dtype)[:, None]
    found: NDArray[Any] = (codes[..., None, :] >> by) & codes.dtype.type((1 << bits) - 1)
    return found


def _inner(codes: NDArray[Any], bits: int, count: int) -> NDArray[Any]:
    """As `_shifts`, the codes of one integer side by side: (..., n * count)."""
    by = (bits * np.arange(count)).astype(codes.dtype)
    found: NDArray[Any] = (codes[..., None] >> by) & codes.dtype.type((1 << bits) - 1)
    return found.reshape(*codes.shape[:-1], -1)


def _wide(values: NDArray[Any]) -> Floats:
    return values.astype(np.float32)


def _flat(values: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(values, dtype=np.float32).reshape(len(values), -1)


def _column(values: NDArray[Any]) -> Floats:
    return _wide(values)[:, None]


def _nibbles(blocks: Blocks) -> NDArray[np.uint8]:
    """Codes of 4 bits of blocks of 32: the low halves are weights 0 to 15."""
    return _shifts(blocks["qs"], 4, 2).reshape(len(blocks), -1)


def _fives(blocks: Blocks) -> NDArray[np.uint8]:
    high = _inner(blocks["qh"][:, None], 1, 32).astype(np.uint8)
    return _nibbles(blocks) | (high << np.uint8(4))


def _q4_0(blocks: Blocks) -> Floats:
    return _column(blocks["d"]) * (_wide(_nibbles(blocks)) - np.float32(8))


def _q4_1(blocks: Blocks) -> Floats:
    return _column(blocks["d"]) * _wide(_nibbles(blocks)) + _column(blocks["m"])


def _q5_0(blocks: Blocks) -> Floats:
    return _column(blocks["d"]) * (_wide(_fives(blocks)) - np.float32(16))


def _q5_1(blocks: Blocks) -> Floats:
    return _column(blocks["d"]) * _wide(_fives(blocks)) + _column(blocks["m"])


def _q8_0(blocks: Blocks) -> Floats:
    return _wide(blocks["qs"]) * _column(blocks["d"])


def _q2_k(blocks: Blocks) -> Floats:
    scales = _column(blocks["d"]) * _wide(blocks["scales"] & 15)
    least = _column(blocks["dmin"]) * _wide(blocks["scales"] >> 4)
    codes = _shifts(blocks["qs"].reshape(-1, 2, 32), 2, 4).reshape(-1, 16, 16)
    return _flat(scales[..., None] * _wide(codes) - least[..., None])


def _q3_k(blocks: Blocks) -> Floats:
    packed = blocks["scales"]
    low, high = _shifts(packed[:, :8], 4, 2).reshape(-1, 16), _shifts(packed[:, 8:], 2, 4).reshape(-1, 16)
    scales = _column(blocks["d"]) * (_wide(low | (high << np.uint8(4))) - np.float32(32))
    codes = _shifts(blocks["qs"].reshape(-1, 2, 32), 2, 4).reshape(-1, 16, 16)
    # A set bit of the mask is an offset of 0, a clear one of -4.
    lowered = np.uint8(1) - _shifts(blocks["hmask"], 1, 8).reshape(-1, 16, 16)
    return _flat(scales[..., None] * (_wide(codes) - np.float32(4) * _wide(lowered)))


def _scales_and_minima(blocks: Blocks) -> tuple[Floats, Floats]:
    """Both of Q4_K and Q5_K, float32 (blocks, 8): 6 bits each in 12 bytes, the upper bits of the last four in the first."""
    first, second, third = blocks["scales"].reshape(-1, 3, 4).transpose(1, 0, 2)
    scales = np.concatenate([first & 63, (third & 15) | (first >> 2) & 48], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 2) & 48], axis=1)
    return _column(blocks["d"]) * _wide(scales), _column(blocks["dmin"]) * _wide(minima)


def _q4_k(blocks: Blocks) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    codes = _shifts(blocks["qs"].reshape(-1, 4, 32), 4, 2).reshape(-1, 8, 32)
    return _flat(scales[..., None] * _wide(codes) - minima[..., None])


def _q5_k(blocks: Blocks) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    codes = _shifts(blocks["qs"].reshape(-1, 4, 32), 4, 2).reshape(-1, 8, 32)
    codes |= _shifts(blocks["qh"], 1, 8) << np.uint8(4)
    return _flat(scales[..., None] * _wide(codes) - minima[..., None])


def _q6_k(blocks: Blocks) -> Floats:
    low = _shifts(blocks["ql"].reshape(-1, 2, 64), 4, 2).reshape(-1, 8, 32)
    high = _shifts(blocks["qh"].reshape(-1, 2, 32), 2, 4).reshape(-1, 8, 32)
    codes = _wide(low | (high << np.uint8(4))) - np.float32(32)
    scales = _column(blocks["d"]) * _wide(blocks["scales"])
    return _flat(scales[..., None] * codes.reshape(-1, 16, 16))


def _signed(bytes_: NDArray[np.uint8]) -> Floats:
    """Eight signs of each byte of (..., n), 1 or -1: (..., n, 8)."""
    bits = _inner(bytes_[..., None], 1, 8)
    return np.float32(1) - np.float32(2) * _wide(bits)


def _quarters(blocks: Blocks, scales: NDArray[Any], by: float) -> Floats:
    return _column(blocks["d"]) * (np.float32(0.5) + _wide(scales)) * np.float32(by)


def _iq2_xxs(blocks: Blocks) -> Floats:
    words = blocks["qs"]
    scales = _quarters(blocks, words[:, :, 1] >> 28, 0.25)
    signs = _signed(_SIGNS[_inner(words[:, :, 1], 7, 4)]).reshape(-1, 8, 4, 8)
    points = book("IQ2_XXS")[_inner(words[:, :, 0], 8, 4)].reshape(-1, 8, 4, 8)
    return _flat(scales[..., None, None] * points * signs)


def _iq2_xs(blocks: Blocks) -> Floats:
    codes = blocks["qs"]
    scales = _quarters(blocks, _inner(blocks["scales"], 4, 2), 0.25)
    points, signs = book("IQ2_XS")[codes & 511], _signed(_SIGNS[codes >> 9])
    return _flat(scales[..., None, None] * points.reshape(-1, 16, 2, 8) * signs.reshape(-1, 16, 2, 8))


def _iq2_s(blocks: Blocks) -> Floats:
    scales = _quarters(blocks, _inner(blocks["scales"], 4, 2), 0.25)
    numbers = blocks["qs"].astype(np.uint16) | _inner(blocks["qh"], 2, 4).astype(np.uint16) << 8
    points, signs = book("IQ2_S")[numbers], _signed(blocks["signs"])
    return _flat(scales[..., None, None] * points.reshape(-1, 16, 2, 8) * signs.reshape(-1, 16, 2, 8))


def _iq3_xxs(blocks: Blocks) -> Floats:
    words = blocks["scales"]
    scales = _quarters(blocks, words >> 28, 0.5)
    signs = _signed(_SIGNS[_inner(words, 7, 4)]).reshape(-1, 8, 4, 8)
    points = book("IQ3_XXS")[blocks["qs"]].reshape(-1, 8, 4, 8)
    return _flat(scales[..., None, None] * points * signs)


def _iq3_s(blocks: Blocks) -> Floats:
    scales = _column(blocks["d"]) * (np.float32(1) + np.float32(2) * _wide(_inner(blocks["scales"], 4, 2)))
    numbers = blocks["qs"].astype(np.uint16) | _inner(blocks["qh"], 1, 8).astype(np.uint16) << 8
    points, signs = book("IQ3_S")[numbers].reshape(-1, 8, 4, 8), _signed(blocks["signs"]).reshape(-1, 8, 4, 8)
    return _flat(scales[..., None, None] * points * signs)


def _iq1_s(blocks: Blocks) -> Floats:
    high = blocks["qh"]
    scales = _column(blocks["d"]) * _wide(2 * (high >> 12 & 7) + 1)
    delta = np.where(high & 0x8000, -_DELTA, _DELTA)
    points = book("IQ1_S")[blocks["qs"].astype(np.uint16) | _inner(high, 3, 4) << 8].reshape(-1, 8, 32)
    return _flat(scales[..., None] * (points + delta[..., None]))


def _iq1_m(blocks: Blocks) -> Floats:
    packed = blocks["scales"]
    # The float16 scale of a block is in the upper four bits of four words.
    whole = (packed[:, 0] >> 12) | (packed[:, 1] >> 8 & 0x00F0) | (packed[:, 2] >> 4 & 0x0F00) | (packed[:, 3] & 0xF000)
    scales = _column(whole.view(np.float16)) * _wide(2 * _inner(packed, 3, 4) + 1)
    nibbles = _inner(blocks["qh"], 4, 2)
    delta = np.where(nibbles & 8, -_DELTA, _DELTA).reshape(-1, 16, 2, 1)
    numbers = blocks["qs"].astype(np.uint16) | (nibbles & 7).astype(np.uint16) << 8
    return _flat(scales[..., None, None] * (book("IQ1_S")[numbers].reshape(-1, 16, 2, 8) + delta))


def _iq4_nl(blocks: Blocks) -> Floats:
    return _column(blocks["d"]) * _IQ4[_nibbles(blocks)]


def _iq4_xs(blocks: Blocks) -> Floats:
    low, high = _inner(blocks["scales_l"], 4, 2), _inner(blocks["scales_h"][:, None], 2, 8).astype(np.uint8)
    scales = _column(blocks["d"]) * (_wide(low | (high << np.uint8(4))) - np.float32(32))
    codes = _shifts(blocks["qs"].reshape(-1, 8, 16), 4, 2).reshape(-1, 8, 32)
    return _flat(scales[..., None] * _IQ4[codes])


def _trits(bytes_: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Base-3 digits of (..., n), the first digit of all first: the top bits of the byte times a power of 3."""
    powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
    return (((bytes_[..., None, :] * powers).astype(np.uint16) * 3) >> 8).astype(np.uint8)


def _tq1_0(blocks: Blocks) -> Floats:
    parts = (_trits(blocks["qs"][:, :32], 5), _trits(blocks["qs"][:, 32:], 5), _trits(blocks["qh"], 4))
    codes = np.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=1)
    return _column(blocks["d"]) * (_wide(codes) - np.float32(1))


def _tq2_0(blocks: Blocks) -> Floats:
    codes = _shifts(blocks["qs"].reshape(-1, 2, 32), 2, 4).reshape(len(blocks), -1)
    return _column(blocks["d"]) * (_wide(codes) - np.float32(1))


def _mxfp4(blocks: Blocks) -> Floats:
    exponent = blocks["e"].astype(np.uint32)
    # Half of 2^(e - 127), since the values are doubled; the two smallest are subnormal.
    halved = np.where(exponent < 2, np.uint32(0x00200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
    return halved.astype(np.uint32).view(np.float32)[:, None] * _E2M1[_nibbles(blocks)]


@dataclass(frozen=True)
class BlockType:
    """A block type.

    Attributes:
        name: as llama.cpp calls it.
        number: `ggml_type` in the file.
        weights: of a block.
        record: its fields.
        bits: of a code, so that 2.06 to 2.6 bits a weight are all "2 bits".
        group: weights that share the finest scale.
        floats: what its blocks stand for.
    """

    name: str
    number: int
    weights: int
    record: np.dtype[Any]
    bits: int
    group: int
    floats: Callable[[Blocks], Floats]

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return int(self.record.itemsize)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of scales."""
        return 8 * self.nbytes / self.weights


def _type(name: str, number: int, sizes: tuple[int, int, int], fields: str, floats: Any) -> BlockType:
    """sizes: weights, bits, group. fields: `name:dtype` or `name:dtype:count`, in the order of the file."""
    record = []
    for field in fields.split():
        key, kind, *shape = field.split(":")
        record.append((key, kind, tuple(map(int, shape))) if shape else (key, kind))
    weights, bits, group = sizes
    return BlockType(name, number, weights, np.dtype(record), bits, group, floats)


_ALL = (
    _type("Q4_0", 2, (32, 4, 32), "d:<f2 qs:u1:16", _q4_0),
    _type("Q4_1", 3, (32, 4, 32), "d:<f2 m:<f2 qs:u1:16", _q4_1),
    _type("Q5_0", 6, (32, 5, 32), "d:<f2 qh:<u4 qs:u1:16", _q5_0),
    _type("Q5_1", 7, (32, 5, 32), "d:<f2 m:<f2 qh:<u4 qs:u1:16", _q5_1),
    _type("Q8_0", 8, (32, 8, 32), "d:<f2 qs:i1:32", _q8_0),
    _type("Q2_K", 10, (256, 2, 16), "scales:u1:16 qs:u1:64 d:<f2 dmin:<f2", _q2_k),
    _type("Q3_K", 11, (256, 3, 16), "hmask:u1:32 qs:u1:64 scales:u1:12 d:<f2", _q3_k),
    _type("Q4_K", 12, (256, 4, 32), "d:<f2 dmin:<f2 scales:u1:12 qs:u1:128", _q4_k),
    _type("Q5_K", 13, (256, 5, 32), "d:<f2 dmin:<f2 scales:u1:12 qh:u1:32 qs:u1:128", _q5_k),
    _type("Q6_K", 14, (256, 6, 16), "ql:u1:128 qh:u1:64 scales:i1:16 d:<f2", _q6_k),
    _type("IQ2_XXS", 16, (256, 2, 32), "d:<f2 qs:<u4:8:2", _iq2_xxs),
    _type("IQ2_XS", 17, (256, 2, 16), "d:<f2 qs:<u2:32 scales:u1:8", _iq2_xs),
    _type("IQ3_XXS", 18, (256, 3, 32), "d:<f2 qs:u1:64 scales:<u4:8", _iq3_xxs),
    _type("IQ1_S", 19, (256, 2, 32), "d:<f2 qs:u1:32 qh:<u2:8", _iq1_s),
    _type("IQ4_NL", 20, (32, 4, 32), "d:<f2 qs:u1:16", _iq4_nl),
    _type("IQ3_S", 21, (256, 3, 32), "d:<f2 qs:u1:64 qh:u1:8 signs:u1:32 scales:u1:4", _iq3_s),
    _type("IQ2_S", 22, (256, 2, 16), "d:<f2 qs:u1:32 signs:u1:32 qh:u1:8 scales:u1:8", _iq2_s),
    _type("IQ4_XS", 23, (256, 4, 32), "d:<f2 scales_h:<u2 scales_l:u1:4 qs:u1:128", _iq4_xs),
    _type("IQ1_M", 29, (256, 2, 16), "qs:u1:32 qh:u1:16 scales:<u2:4", _iq1_m),
    _type("TQ1_0", 34, (256, 2, 256), "qs:u1:48 qh:u1:4 d:<f2", _tq1_0),
    _type("TQ2_0", 35, (256, 2, 256), "qs:u1:64 d:<f2", _tq2_0),
    _type("MXFP4", 39, (32, 4, 32), "e:u1 qs:u1:16", _mxfp4),
)
BLOCK_TYPES: Mapping[str, BlockType] = {one.name: one for one in _ALL}
# Types of tensors that are not quantized: ggml_type -> safetensors dtype
FLOAT_TYPES: Mapping[int, str] = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
NUMBERED: Mapping[int, BlockType] = {one.number: one for one in _ALL}


def dequantized(kind: BlockType, rows: NDArray[np.uint8]) -> Floats:
    """The weights of quantized rows.

    Args:
        kind: the type of their blocks.
        rows: uint8 (rows, bytes of a row).

    Returns:
        float32 (rows, weights of a row).

    Raises:
        FormatError: a row does not consist of whole blocks.
    """
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] % kind.nbytes:
        raise FormatError(
            f"{kind.name.lower()} is {rows.dtype} {rows.shape}: rows of it are uint8, in blocks of {kind.nbytes} bytes; "
            "fetch or write the file again"
        )
    blocks = np.ascontiguousarray(rows).reshape(-1).view(kind.record)
    with np.errstate(invalid="ignore", over="ignore"):  # codes and scales may be anything
        return kind.floats(blocks).reshape(len(rows), -1)
