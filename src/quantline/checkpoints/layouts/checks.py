"""Checks that the layouts share: which tensors are given, their shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.affine import Grid
from quantline.checkpoints.layouts.half import narrowed, widened

Tensors = Mapping[str, NDArray[Any]]


def check_suffixes(tensors: Tensors, known: Mapping[str, bool]) -> None:
    """Raise FormatError unless all required (True) suffixes are given, and no unknown ones."""
    missing = [suffix for suffix, required in known.items() if required and suffix not in tensors]
    unknown = sorted(set(tensors) - set(known))
    if missing:
        raise FormatError(f"tensors missing: {', '.join(missing)}: the checkpoint is incomplete or in another layout")
    if unknown:
        raise FormatError(f"tensors this layout does not have: {', '.join(unknown)}: read it in its own layout")


def check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise FormatError unless a tensor has the shape that the others imply."""
    if array.shape != shape:
        raise FormatError(
            f"{name} has shape {array.shape}, the other tensors imply {shape}: "
            "check bits, group_size and layout against the checkpoint's config"
        )


def as_float(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """float16 and float32 as they are; bfloat16 exactly widened to float32.

    Raises:
        FormatError: any other dtype.
    """
    if array.dtype in (np.float16, np.float32):
        return array
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    raise FormatError(f"{name} is {array.dtype}: layouts store float16, bfloat16 or float32; convert it first")


def bias_of(tensors: Tensors) -> NDArray[Any] | None:
    """The optional bias (out,)."""
    return as_float("bias", tensors["bias"]) if "bias" in tensors else None


def to_half(name: str, array: NDArray[Any], remedy: str) -> NDArray[np.float16]:
    """The same values as float16.

    Raises:
        FormatError: float16 cannot represent a value, so writing it would change the weights; ``remedy`` says what to do.
    """
    if array.dtype == np.float16:
        return array.copy()
    half = narrowed(array)
    if not np.array_equal(widened(half), array):
        raise FormatError(f"{name} has values that float16 cannot represent: {remedy}")
    return half


def check_awq(linear: Grid) -> None:
    """Raise FormatError for what AWQ layouts cannot store: bits other than 4, reordered groups, widths of partial words."""
    if linear.bits != 4:
        raise FormatError(f"bits={linear.bits}: AWQ layouts store 4 bits only; use gptq or gptq_v2")
    if not linear.sequential:
        raise FormatError("groups are reordered by activation, which AWQ layouts cannot store: use gptq or gptq_v2")
    for name, width in (("in_features", linear.in_features), ("out_features", linear.out_features)):
        if width % 8:
            raise FormatError(
                f"{name}={width} is not a multiple of 8: AWQ layouts cannot store it; leave it unquantized"
            )
