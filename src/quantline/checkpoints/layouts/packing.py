"""Packing of unsigned 2-, 3-, 4- and 8-bit codes into 32-bit words, low bits first.

Along the packed axis, code ``i`` of a run occupies bits ``[i*b, (i+1)*b)`` of one long little-endian bit string that is
cut into 32-bit words. For 2, 4 and 8 bits a word holds ``32 / b`` whole codes. For 3 bits, 32 codes fill 3 words
and two of them straddle: code 10 has two bits in word 0 and one in word 1, code 21 one bit in word 1 and two in word 2.

Words are int32 on disk (the sign carries no meaning); all arithmetic here is on a uint32 view of them.

Codes may be row-major or column-major (the transpose of a contiguous matrix). Transposing bytes costs several times as
much as packing, so codes are packed in their memory order, and the words, an eighth as many, are transposed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError

BITS = (2, 3, 4, 8)

# Temporaries of about this many words stay in the cache. Larger ones made packing memory-bound, and with many small ones
# the interpreter takes most of the time.
_CHUNK_WORDS = 1 << 17

# Elements transposed together: as words they fill the first cache. In rows, at least half a cache line of words.
_TILE, _LEAST_ROWS = 1 << 13, 8


def values_per_run(bits: int) -> int:
    """Codes in the smallest run that fills whole words: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    _check_bits(bits)
    return 32 if bits == 3 else 32 // bits


def words_per_run(bits: int) -> int:
    """Words in such a run: 3 for 3 bits, otherwise 1."""
    return values_per_run(bits) * bits // 32


def pack(codes: NDArray[np.uint8], bits: int, axis: int, order: Sequence[int] | None = None) -> NDArray[np.int32]:
    """Pack a matrix of codes along one axis.

    Args:
        codes: uint8 (rows, cols), every value below ``2**bits``. Not modified.
        bits: 2, 3, 4 or 8.
        axis: 0 packs rows together, giving (rows*bits/32, cols); 1 packs columns, giving (rows, cols*bits/32).
        order: for layouts that interleave (AWQ): field ``k`` of each run takes code ``order[k]`` of that run.

    Returns:
        int32 words, row-major.

    Raises:
        FormatError: a code does not fit, or the axis is not a whole number of words.
    """
    fields = _fields(bits, order)
    values, words = values_per_run(bits), words_per_run(bits)
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise FormatError(f"codes are {codes.dtype} {codes.shape}: give a uint8 matrix")
    if _by_columns(codes):
        return turned(pack(codes.T, bits, 1 - axis, order))
    if codes.shape[axis] % values:
        raise FormatError(
            f"width {codes.shape[axis]} does not fill whole 32-bit words at {bits} bits: "
            f"it must be a multiple of {values}"
        )
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise FormatError(f"code {int(codes.max())} does not fit {bits} bits: give codes in [0, {2**bits - 1}]")
    if _in_bytes(bits, axis, order):
        return _pack_bytes(np.ascontiguousarray(codes), bits)
    shape = list(codes.shape)
    shape[axis] = shape[axis] // values * words
    packed = np.empty(shape, dtype=np.uint32)
    if _in_rows(bits, axis):
        return _pack_rows(np.ascontiguousarray(codes), packed, bits, order or range(values))
    for source, target in _chunks(np.ascontiguousarray(codes), packed, values, words, axis):
        shifted = np.empty(target.shape[:-1], dtype=np.uint32)
        started = [False] * words
        for word, value, shift in fields:
            field = target[..., word]
            if not started[word]:  # the first field of a word starts at bit 0 or is a straddler's upper part
                np.copyto(field, source[..., value])
                if shift < 0:
                    np.right_shift(field, np.uint32(-shift), out=field)
                started[word] = True
                continue
            np.copyto(shifted, source[..., value])
            np.left_shift(shifted, np.uint32(shift), out=shifted)
            np.bitwise_or(field, shifted, out=field)
    return packed.view(np.int32)


def unpack(words: NDArray[Any], bits: int, axis: int, order: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Undo `pack`.

    Args:
        words: int32 or uint32 (rows, cols). Not modified.
        bits, axis, order: as given to `pack`.

    Returns:
        uint8 codes: (rows*32/bits, cols) for axis 0, (rows, cols*32/bits) for axis 1; column-major if the words are.

    Raises:
        FormatError: not a matrix of 32-bit words, or a 3-bit axis that is not a multiple of 3 words.
    """
    fields = _fields(bits, order)
    values, per_run = values_per_run(bits), words_per_run(bits)
    if words.dtype not in (np.int32, np.uint32) or words.ndim != 2:
        raise FormatError(f"packed words are {words.dtype} {words.shape}: this layout stores an int32 matrix")
    if words.shape[axis] % per_run:
        raise FormatError(f"{words.shape[axis]} words do not hold {bits}-bit codes: the number must be a multiple of 3")
    if _by_columns(words):
        return unpack(words.T, bits, 1 - axis, order).T
    if _in_bytes(bits, axis, order):
        return _unpack_bytes(np.ascontiguousarray(words), bits)
    shape = list(words.shape)
    shape[axis] = shape[axis] // per_run * values
    codes = np.empty(shape, dtype=np.uint8)
    if _in_rows(bits, axis):
        return _unpack_rows(np.ascontiguousarray(words).view(np.uint32), codes, bits, order or range(values))
    mask = np.uint32(2**bits - 1)
    for target, source in _chunks(codes, np.ascontiguousarray(words).view(np.uint32), values, per_run, axis):
        shifted = np.empty(source.shape[:-1], dtype=np.uint32)
        for word, value, shift in fields:
            if shift < 0:  # the upper part of a straddling code: its lower part was written just before
                np.left_shift(source[..., word], np.uint32(-shift), out=shifted)
                np.bitwise_and(shifted, mask, out=shifted)
                np.bitwise_or(target[..., value], shifted, out=target[..., value], casting="unsafe")
                continue
            np.right_shift(source[..., word], np.uint32(shift), out=shifted)
            np.bitwise_and(shifted, mask, out=shifted)
            np.copyto(target[..., value], shifted, casting="unsafe")
    return codes


def _in_bytes(bits: int, axis: int, order: Sequence[int] | None) -> bool:
    """Whether each byte of a word holds one code or two, in their order."""
    return bits in (4, 8) and axis == 1 and order is None and sys.byteorder == "little"


def _in_rows(bits: int, axis: int) -> bool:
    """Whether whole rows of codes are combined into bytes of words."""
    return bits in (4, 8) and axis == 0


def _pack_bytes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    if bits == 8:
        return codes.copy().view(np.int32)
    packed = np.empty((codes.shape[0], codes.shape[1] // 2), dtype=np.uint8)
    pairs, octets = codes.reshape(-1).view(np.uint16), packed.reshape(-1)  # the even code below, the odd one above it
    spare = np.empty(min(_CHUNK_WORDS, pairs.size), dtype=np.uint16)
    for part in _spans(pairs.size, spare.size):
        pair = np.right_shift(pairs[part], np.uint16(4), out=spare[: pairs[part].size])
        np.bitwise_or(pair, pairs[part], out=pair)
        np.copyto(octets[part], pair, casting="unsafe")  # the low byte holds both
    return packed.view(np.int32)


def _unpack_bytes(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    stored = words.view(np.uint8)
    if bits == 8:
        return stored.copy()
    codes = np.empty((stored.shape[0], stored.shape[1] * 2), dtype=np.uint8)
    pairs, octets = codes.reshape(-1).view(np.uint16), stored.reshape(-1)
    spare = np.empty(min(_CHUNK_WORDS, pairs.size), dtype=np.uint16)
    for part in _spans(pairs.size, spare.size):
        pair, above = pairs[part], spare[: pairs[part].size]
        np.copyto(pair, octets[part])
        np.left_shift(pair, np.uint16(4), out=above)
        np.bitwise_or(pair, above, out=pair)
        np.bitwise_and(pair, np.uint16(0x0F0F), out=pair)
    return codes


def _pack_rows(
    codes: NDArray[np.uint8], packed: NDArray[np.uint32], bits: int, order: Sequence[int]
) -> NDArray[np.int32]:
    """Pack eight rows of nibbles or four of bytes into a row of words: pairs into bytes, half words, then words."""
    runs = codes.reshape(-1, len(order), codes.shape[1])
    for rows in _row_blocks(packed):
        shape = packed[rows].shape
        octets = [runs[rows, place] for place in order]
        if bits == 4:
            made = np.empty((4, *shape), dtype=np.uint8)
            for octet, low, high in zip(made, octets[::2], octets[1::2], strict=True):
                np.multiply(
                    high, np.uint8(16), out=octet
                )  # NumPy has no vector instruction for shifts of bytes to the left
                np.bitwise_or(octet, low, out=octet)
            octets = list(made)
        halves = np.empty((2, *shape), dtype=np.uint16)
        for half, low, high in zip(halves, octets[::2], octets[1::2], strict=True):
            np.copyto(half, high)
            np.left_shift(half, np.uint16(8), out=half)
            np.bitwise_or(half, low, out=half)
        np.copyto(packed[rows], halves[1])
        np.left_shift(packed[rows], np.uint32(16), out=packed[rows])
        np.bitwise_or(packed[rows], halves[0], out=packed[rows])
    return packed.view(np.int32)


def _unpack_rows(
    words: NDArray[np.uint32], codes: NDArray[np.uint8], bits: int, order: Sequence[int]
) -> NDArray[np.uint8]:
    runs = codes.reshape(-1, len(order), codes.shape[1])
    for rows in _row_blocks(words):
        shape = words[rows].shape
        shifted, octet = np.empty(shape, dtype=np.uint32), np.empty(shape, dtype=np.uint8)
        half, upper = np.empty(shape, dtype=np.uint16), np.empty(shape, dtype=np.uint16)
        for place in range(4):
            if place == 0:
                np.copyto(half, words[rows], casting="unsafe")
            elif place == 2:
                np.right_shift(words[rows], np.uint32(16), out=shifted)
                np.copyto(half, shifted, casting="unsafe")
            source = np.right_shift(half, np.uint16(8), out=upper) if place % 2 else half
            if bits == 8:
                np.copyto(runs[rows, order[place]], source, casting="unsafe")
                continue
            np.copyto(octet, source, casting="unsafe")
            np.bitwise_and(octet, np.uint8(15), out=runs[rows, order[2 * place]])
            np.right_shift(octet, np.uint8(4), out=runs[rows, order[2 * place + 1]])
    return codes


def _row_blocks(matrix: NDArray[Any]) -> Iterator[slice]:
    return _spans(matrix.shape[0], max(1, _CHUNK_WORDS // max(1, matrix.shape[1])))


def _spans(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(1, step)):
        yield slice(start, start + step)


def turned(matrix: NDArray[Any]) -> NDArray[Any]:
    """A contiguous transpose, some rows at a time: several times faster than one strided copy of a large matrix."""
    rows, columns = matrix.shape
    result = np.empty((columns, rows), dtype=matrix.dtype)
    for part in _spans(rows, max(_LEAST_ROWS, _TILE // max(1, columns))):
        # Side by side: rows a power of two apart would push each other out of the cache.
        result[:, part] = np.ascontiguousarray(matrix[part]).T
    return result


def _by_columns(matrix: NDArray[Any]) -> bool:
    return bool(matrix.flags.f_contiguous and not matrix.flags.c_contiguous)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise FormatError(f"bits={bits}: codes are packed at 2, 3, 4 or 8 bits")


def _fields(bits: int, order: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """(word, value, left shift) of every field of one run; a negative shift is a straddling code's upper part."""
    values = values_per_run(bits)
    order = range(values) if order is None else order
    if sorted(order) != list(range(values)):
        raise FormatError(f"order {list(order)} is not a permutation of the {values} codes of a run")
    fields: list[tuple[int, int, int]] = []
    for position, value in enumerate(order):
        word, start = divmod(position * bits, 32)
        fields.append((word, value, start))
        if start + bits > 32:
            fields.append((word + 1, value, start - 32))
    return fields


def _chunks(
    codes: NDArray[Any], words: NDArray[Any], values: int, per_run: int, axis: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Views of the same part of both matrices with the position inside a run as the last axis."""
    if axis == 0:
        cols = codes.shape[1]
        runs = codes.shape[0] // values
        code_runs = codes.reshape(runs, values, cols).transpose(0, 2, 1)  # (runs, cols, values)
        word_runs = words.reshape(runs, per_run, cols).transpose(0, 2, 1)  # (runs, cols, words)
    elif axis == 1:
        rows = codes.shape[0]
        runs = codes.shape[1] // values
        code_runs = codes.reshape(rows, runs, values)
        word_runs = words.reshape(rows, runs, per_run)
    else:
        raise FormatError(f"axis={axis}: codes are packed along axis 0 or 1")
    step = max(1, _CHUNK_WORDS // max(1, code_runs.shape[1]))
    for start in range(0, code_runs.shape[0], step):
        yield code_runs[start : start + step], word_runs[start : start + step]
