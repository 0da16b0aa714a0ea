"""float16 conversions by integer arithmetic on whole arrays; those of NumPy convert one value at a time.

The results equal NumPy's bit for bit. The fast path is for positive values in the normal range of float16, as scales are;
for all others NumPy converts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# As bits of float32: the smallest normal float16, and the smallest value that rounds to infinity in float16.
_SMALLEST, _OVERFLOW = 0x38800000, 0x477FF000
# Difference of the exponents' bias: 127 in float32, 15 in float16.
_BIAS = 127 - 15


def narrowed(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """float32 rounded to the nearest float16, ties to even. Overflow gives infinity and underflow zero, both silently."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if not bits.size or int(bits.min()) < _SMALLEST or int(bits.max()) >= _OVERFLOW:
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16)
    rounded = np.right_shift(bits, np.uint32(13))
    np.bitwise_and(rounded, np.uint32(1), out=rounded)  # ties go to the even neighbour
    np.add(rounded, bits, out=rounded)
    np.add(rounded, np.uint32(0xFFF), out=rounded)
    np.subtract(rounded, np.uint32(_BIAS << 23), out=rounded)
    np.right_shift(rounded, np.uint32(13), out=rounded)
    return rounded.astype(np.uint16).view(np.float16)


def widened(values: NDArray[Any]) -> NDArray[np.float32]:
    """float16 as float32, which is exact; float32 as it is."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    bits = np.ascontiguousarray(values).view(np.uint16)
    if not bits.size or int(bits.min()) < 0x400 or int(bits.max()) >= 0x7C00:
        return values.astype(np.float32)
    wide = bits.astype(np.uint32)
    np.left_shift(wide, np.uint32(13), out=wide)
    np.add(wide, np.uint32(_BIAS << 23), out=wide)
    return wide.view(np.float32)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no value is infinite or NaN."""
    if values.dtype != np.float16 or not values.size:
        return bool(np.isfinite(values).all())
    bits = np.ascontiguousarray(values).view(np.uint16)
    return int(bits.max()) < 0x7C00 or int(np.bitwise_and(bits, np.uint16(0x7FFF)).max()) < 0x7C00
