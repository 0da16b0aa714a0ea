"""The inner loops of a conversion from one code per byte to words, and of the proof that reads the words back.

Plain Python over pointers, which `kernels_jit` compiles; nothing here is called directly. Codes are signed bytes, one
output channel per row, as msModelSlim stores them.

flat: the codes of a word are adjacent, and words are in the order of their codes (compressed-tensors); 4 or 8 bits, low
bits first.
along: the same words, with the matrix of words transposed (GPTQ).
across: a word holds one column's codes of eight rows, in AWQ's order, and the matrix of words is transposed; 4 bits.

When words are transposed, a kernel works on tiles of 16 rows by 256 words in a scratch buffer that stays in the first-level
cache. In the tile, codes become words, or are compared with them, in an order that suits vector instructions; words are
loaded and stored in lines of 64 bytes. The last 16 rows may overlap those before them, so at least 16 are needed.

`pack_...` cannot fail: it takes the low bits. `differ_...` decodes the words independently and compares whole bytes, so it
also detects codes that have more bits than allowed; it returns 0 if all are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantline.checkpoints.layouts.awq_gemm import ORDER

# Rows of words, and words per row, in the scratch buffer.
ROWS, COLUMNS = 16, 256
# Argument types: b a pointer to bytes, w a pointer to words, n an integer. The scratch buffer is passed as both pointers.
SIGNATURES = {
    "pack_flat": "bnnb", "differ_flat": "bnnb", "pack_along": "bnnnnwbw", "differ_along": "bnnnnwbw",
    "pack_across": "bnnnwbw", "differ_across": "bnnnwbw",
}  # fmt: skip
_A, _B, _C, _D, _E, _F, _G, _H = ORDER


def pack_flat(codes: Any, size: Any, bits: Any, words: Any) -> Any:
    """Pack `size` codes to the bytes of their words."""
    if bits == 4:
        for octet in range(size // 2):
            words[octet] = np.uint8(((codes[2 * octet] & 15) | (codes[2 * octet + 1] << 4)) ^ 0x88)
    else:
        for octet in range(size):
            words[octet] = np.uint8(codes[octet] ^ 0x80)
    return 0


def differ_flat(codes: Any, size: Any, bits: Any, words: Any) -> Any:
    """Whether words of `pack_flat` stand for other codes than these."""
    other = np.uint8(0)
    if bits == 4:
        for octet in range(size // 2):
            low = np.uint8((words[octet] & 15) - 8) ^ codes[2 * octet]
            high = np.uint8((words[octet] >> 4) - 8) ^ codes[2 * octet + 1]
            other = np.uint8(other | low | high)
    else:
        for octet in range(size):
            other = np.uint8(other | (np.uint8(words[octet] - 128) ^ codes[octet]))
    return other


def pack_along(codes: Any, stride: Any, rows: Any, width: Any, bits: Any, words: Any, octets: Any, tile: Any) -> Any:
    """Pack codes at `row * stride + column` to words at `word * rows + row`; the `width` codes of a row fill whole words."""
    per_word, lines = 32 // bits, ROWS if rows > ROWS else rows  # the compiler would unroll a constant number of them
    for start in range(0, rows, ROWS):
        row = start if start + ROWS <= rows else rows - ROWS
        for first in range(0, width // per_word, COLUMNS):
            count = COLUMNS if first + COLUMNS <= width // per_word else width // per_word - first
            for line in range(lines):
                source, target = (row + line) * stride + first * per_word, line * 4 * COLUMNS
                if bits == 4:
                    for octet in range(4 * count):
                        low, high = codes[source + 2 * octet], codes[source + 2 * octet + 1]
                        octets[target + octet] = np.uint8(((low & 15) | (high << 4)) ^ 0x88)
                else:
                    for octet in range(4 * count):
                        octets[target + octet] = np.uint8(codes[source + octet] ^ 0x80)
            for word in range(count):
                place = (first + word) * rows + row
                for line in range(ROWS):
                    words[place + line] = tile[line * COLUMNS + word]
    return 0


def differ_along(codes: Any, stride: Any, rows: Any, width: Any, bits: Any, words: Any, octets: Any, tile: Any) -> Any:
    """Whether words of `pack_along` stand for other codes than these."""
    per_word, lines = 32 // bits, ROWS if rows > ROWS else rows  # the compiler would unroll a constant number of them
    other = np.uint8(0)
    for start in range(0, rows, ROWS):
        row = start if start + ROWS <= rows else rows - ROWS
        for first in range(0, width // per_word, COLUMNS):
            count = COLUMNS if first + COLUMNS <= width // per_word else width // per_word - first
            for word in range(count):
                place = (first + word) * rows + row
                for line in range(ROWS):
                    tile[line * COLUMNS + word] = words[place + line]
            for line in range(lines):
                source, target = (row + line) * stride + first * per_word, line * 4 * COLUMNS
                if bits == 4:
                    for octet in range(4 * count):
                        low = np.uint8((octets[target + octet] & 15) - 8) ^ codes[source + 2 * octet]
                        high = np.uint8((octets[target + octet] >> 4) - 8) ^ codes[source + 2 * octet + 1]
                        other = np.uint8(other | low | high)
                else:
                    for octet in range(4 * count):
                        other = np.uint8(other | (np.uint8(octets[target + octet] - 128) ^ codes[source + octet]))
    return other


def pack_across(codes: Any, stride: Any, rows: Any, width: Any, words: Any, octets: Any, tile: Any) -> Any:
    """Pack codes at `row * stride + column` to words at `column * rows / 8 + row / 8`; `rows` is a multiple of 8."""
    for start in range(0, rows // 8, ROWS):
        row = start if start + ROWS <= rows // 8 else rows // 8 - ROWS
        for first in range(0, width, COLUMNS):
            count = COLUMNS if first + COLUMNS <= width else width - first
            for line in range(ROWS):
                source, target = (row + line) * 8 * stride + first, line * COLUMNS
                for column in range(count):
                    at = source + column
                    one = np.uint8((codes[at + _A * stride] & 15) | (codes[at + _B * stride] << 4))
                    two = np.uint8((codes[at + _C * stride] & 15) | (codes[at + _D * stride] << 4))
                    three = np.uint8((codes[at + _E * stride] & 15) | (codes[at + _F * stride] << 4))
                    four = np.uint8((codes[at + _G * stride] & 15) | (codes[at + _H * stride] << 4))
                    lower = np.uint32(one) | (np.uint32(two) << np.uint32(8))
                    upper = np.uint32(three) | (np.uint32(four) << np.uint32(8))
                    tile[target + column] = (lower | (upper << np.uint32(16))) ^ np.uint32(0x88888888)
            for column in range(count):
                place = (first + column) * (rows // 8) + row
                for line in range(ROWS):
                    words[place + line] = tile[line * COLUMNS + column]
    return 0


def differ_across(codes: Any, stride: Any, rows: Any, width: Any, words: Any, octets: Any, tile: Any) -> Any:
    """Whether words of `pack_across` stand for other codes than these."""
    other, lines = np.uint8(0), ROWS if rows // 8 > ROWS else rows // 8
    for start in range(0, rows // 8, ROWS):
        row = start if start + ROWS <= rows // 8 else rows // 8 - ROWS
        for first in range(0, width, COLUMNS):
            count = COLUMNS if first + COLUMNS <= width else width - first
            for column in range(count):
                place = (first + column) * (rows // 8) + row
                for line in range(ROWS):
                    tile[line * COLUMNS + column] = words[place + line]
            for line in range(lines):
                source, target = (row + line) * 8 * stride + first, line * 4 * COLUMNS
                for octet in range(4):  # of a word: two rows' codes
                    below, above = source + ORDER[2 * octet] * stride, source + ORDER[2 * octet + 1] * stride
                    for column in range(count):
                        stored = octets[target + 4 * column + octet]
                        low = np.uint8((stored & 15) - 8) ^ codes[below + column]
                        high = np.uint8((stored >> 4) - 8) ^ codes[above + column]
                        other = np.uint8(other | low | high)
    return other
