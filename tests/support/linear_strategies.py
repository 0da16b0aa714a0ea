"""Random middle forms, extremes included."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from quantline.checkpoints.layouts import AffineLinear
from quantline.checkpoints.layouts.affine import sequential_groups


def build(bits: int, in_features: int, out_features: int, group_size: int, seed: int = 0, **parts: Any) -> AffineLinear:
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else in_features // group_size
    top = 2**bits
    values: dict[str, Any] = {
        "codes": rng.integers(0, top, (in_features, out_features)).astype(np.uint8),
        "scales": (rng.random((groups, out_features)) + 0.01).astype(np.float16),
        "zeros": rng.integers(0, top, (groups, out_features)).astype(np.int16),
        "group_index": sequential_groups(in_features, group_size),
    }
    return AffineLinear(**{**values, **parts}, bits=bits, group_size=group_size)


@st.composite
def linears(draw: st.DrawFn, bits: st.SearchStrategy[int], groups: tuple[int, ...], reorder: bool) -> AffineLinear:
    b = draw(bits)
    group_size = draw(st.sampled_from(groups))
    in_features = draw(st.sampled_from([128, 256, 384]))
    out_features = draw(st.sampled_from([32, 64, 96]))
    linear = build(b, in_features, out_features, group_size, draw(st.integers(0, 2**16)))
    extreme = draw(st.sampled_from(["random", "zero", "max", "equal", "middle"]))
    top = 2**b - 1
    if extreme in ("zero", "max", "middle"):
        linear.zeros[...] = {"zero": 0, "max": top, "middle": 2 ** (b - 1)}[extreme]
        linear.codes[:, 0] = top
    if extreme == "equal":
        linear.codes[...] = linear.zeros.max()
    if reorder and draw(st.booleans()):
        np.random.default_rng(1).shuffle(linear.group_index)
    bias = draw(st.sampled_from([None, np.float16]))
    if bias is None:
        return linear
    parts = {name: getattr(linear, name) for name in ("codes", "scales", "zeros", "group_index")}
    return AffineLinear(**parts, bits=b, group_size=group_size, bias=np.arange(out_features, dtype=bias))
