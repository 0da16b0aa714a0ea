"""Recovers scales that a method folded into a layer's neighbours, so that quantized and float weights can be compared.

AWQ divides a linear's inputs per channel and multiplies its columns. The division is folded into the preceding norm or
linear, whose rows it divides.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, to_float32

# A norm with a folded scale differs by more; float16 rounding gives 5e-4.
_SAME_NORM = 1e-2
# If a column's correlation with the float one is below this, rounding changed more than its scale.
_TAKEN_APART = 0.9
_NORM = re.compile(r"norm|(?:^|\.)ln_")


def unfold(approximation: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo scales that were folded into neighbours: diag(1/r) W' diag(1/c), see `folded_scales`.

    Args:
        approximation: (out, in), as decoded.
        weight: (out, in), of the float model.

    Returns:
        (out, in), to be compared with `weight`.
    """
    rows, columns = folded_scales(approximation, weight)
    return approximation / rows[:, None] / columns


def folded_scales(
    approximation: NDArray[np.float32], weight: NDArray[np.float32], rounds: int = 50
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Find r and c of W' = diag(r) W diag(c) + error.

    They are fitted alternately until they converge, by least squares. A column that rounding destroyed (correlation below
    0.9 with the float one) uses the ratio of norms instead: least squares would take weights rounded to zero for a smaller
    scale, and dividing by it would inflate the rest. An all-zero row or column keeps the scale 1.

    The fit absorbs some error that is not a scale: about 1/in + 1/out of its energy. At 4 bits with known scales, the fitted
    error was within 1 % of the true error if the scales spread by 0.25 (standard deviation of the logarithm), and at most
    8 % above it if they spread by 0.7.

    Args:
        approximation: (out, in), as decoded.
        weight: (out, in), of the float model.

    Returns:
        r (out,) and c (in,).
    """
    crossed, squared, energy = approximation * weight, weight * weight, np.square(approximation).sum(axis=0)
    rows, columns = np.ones(len(weight), np.float32), np.ones(weight.shape[1], np.float32)
    for _ in range(rounds):
        before = rows, columns
        matched, expected = rows @ crossed, np.square(rows) @ squared
        fitted, by_norm = _ratio(matched, expected), np.sqrt(_ratio(energy, expected))
        columns = np.where(fitted < _TAKEN_APART * by_norm, by_norm, fitted)
        matching = np.where(
            matched > 0, columns, 0
        )  # columns that do not match the float weight do not affect the rows
        rows = _ratio(crossed @ matching, squared @ np.square(matching))
        if all(np.allclose(new, old, rtol=1e-6, atol=0) for new, old in zip((rows, columns), before, strict=True)):
            break
    return rows, columns


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float32]:
    sound = (above > 0) & (below > 0)
    ratio: NDArray[np.float32] = np.divide(above, below, out=np.ones_like(above, dtype=np.float32), where=sound)
    return ratio


def folds(floats: Checkpoint, checkpoint: Checkpoint) -> bool:
    """Whether a norm differs by more than rounding, so that scales were folded into it."""
    for name in set(floats.names) & set(checkpoint.names):
        if _NORM.search(name) and len(floats.info(name).shape) == 1:
            old, new = to_float32(floats.tensor(name)), to_float32(checkpoint.tensor(name))
            if old.shape != new.shape or np.abs(new - old).max() > _SAME_NORM * np.abs(old).max():
                return True
    return False
