"""compressed-tensors with weights of floating-point codes: FP8, NVFP4, MXFP4 and MXFP8, as llm-compressor writes them.

A scheme is a layout: how codes and scales are stored, and how the runtime rounds the inputs of linears. Tensors of a linear
with a weight (out, in), codes as in `float_codes`:

    FP8     weight F8_E4M3 (out, in); weight_scale float (1), (out, 1), or of blocks (ceil(out/128), ceil(in/128));
            input_scale float (1) where inputs have a fixed scale
    MXFP8   weight F8_E4M3 (out, in); weight_scale U8 (out, in/32)
    NVFP4   weight_packed U8 (out, in/2); weight_scale F8_E4M3 (out, in/16); weight_global_scale F32 (1), by which a scale
            is divided; input_global_scale F32 (1) where inputs are rounded
    MXFP4   weight_packed U8 (out, in/2); weight_scale U8 (out, in/32)

The library itself dequantizes in bfloat16: these weights equal its own once they are rounded to it. Source: the
compressed-tensors package 0.19 (Apache-2.0), whose reader the tests compare with this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts import float_codes as codes
from quantline.checkpoints.layouts.checks import Tensors, as_float, check_suffixes
from quantline.checkpoints.layouts.compressed_tensors import config
from quantline.checkpoints.layouts.compressed_tensors.schemes import (
    BLOCK,
    FP8,
    METHOD,
    MXFP4,
    MXFP8,
    NVFP4,
    SCHEMES,
    FloatScheme,
    section,
)
from quantline.checkpoints.layouts.layout import (
    ConfigSection,
    Fault,
    Layout,
    Shape,
    Storage,
    bits_faults,
    sizes_of,
)
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_stream import TensorSpec

_PACKED = {"weight_packed": True, "weight_scale": True, "bias": False}
TENSORS: Mapping[str, Mapping[str, bool]] = {
    FP8: {"weight": True, "weight_scale": True, "input_scale": False, "bias": False},
    MXFP8: {"weight": True, "weight_scale": True, "bias": False},
    NVFP4: {**_PACKED, "weight_global_scale": True, "input_global_scale": False},
    MXFP4: _PACKED,
}


def dequantize(tensors: Tensors, *, bits: int, group_size: int, scheme: FloatScheme) -> NDArray[np.float32]:
    """One linear's weight, float32 (out, in); NaN codes stay NaN.

    Raises:
        FormatError: tensors are missing or unknown, or their shapes or dtypes do not fit the scheme.
    """
    del bits, group_size  # the scheme's
    check_suffixes(tensors, TENSORS[scheme.format])
    return READERS[scheme.format](tensors, scheme)


def _read_fp8(tensors: Tensors, scheme: FloatScheme) -> NDArray[np.float32]:
    values = codes.E4M3[codes.raw("weight", tensors["weight"], "F8_E4M3")]
    if scheme.strategy == "block":
        return codes.blocked(values, as_float("weight_scale", tensors["weight_scale"]).astype(np.float32), BLOCK)
    return codes.whole(values, tensors["weight_scale"])


def _read_mxfp8(tensors: Tensors, scheme: FloatScheme) -> NDArray[np.float32]:
    values = codes.E4M3[codes.raw("weight", tensors["weight"], "F8_E4M3")]
    scales = codes.E8M0[codes.raw("weight_scale", tensors["weight_scale"], "U8")]
    return codes.grouped(values, scales, scheme.group_size)


def _read_mxfp4(tensors: Tensors, scheme: FloatScheme) -> NDArray[np.float32]:
    values = codes.halves(codes.raw("weight_packed", tensors["weight_packed"], "U8"))
    scales = codes.E8M0[codes.raw("weight_scale", tensors["weight_scale"], "U8")]
    return codes.grouped(values, scales, scheme.group_size)


def _read_nvfp4(tensors: Tensors, scheme: FloatScheme) -> NDArray[np.float32]:
    values = codes.halves(codes.raw("weight_packed", tensors["weight_packed"], "U8"))
    outer = codes.single("weight_global_scale", tensors["weight_global_scale"])
    scales = codes.E4M3[codes.raw("weight_scale", tensors["weight_scale"], "F8_E4M3")] / outer
    return codes.grouped(values, scales, scheme.group_size)


READERS: Mapping[str, Callable[[Tensors, FloatScheme], NDArray[np.float32]]] = {
    FP8: _read_fp8, MXFP8: _read_mxfp8, NVFP4: _read_nvfp4, MXFP4: _read_mxfp4,
}  # fmt: skip


def specs(shape: Shape, _spec: LinearSpec, _storage: Storage, *, scheme: FloatScheme) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that llm-compressor's worker writes."""
    wide, high = shape
    if scheme.format in (NVFP4, MXFP4):
        scale = "F8_E4M3" if scheme.format == NVFP4 else "U8"
        found = {
            "weight_packed": TensorSpec("U8", (high, wide // 2)),
            "weight_scale": TensorSpec(scale, (high, wide // scheme.group_size)),
        }
        outer = ["weight_global_scale"] * (scheme.format == NVFP4)
    else:
        scales = {"channel": (high, 1), "tensor": (1,), "block": (-(-high // BLOCK), -(-wide // BLOCK))}
        scale_shape = scales.get(scheme.strategy, (high, wide // max(scheme.group_size, 1)))
        found = {
            "weight": TensorSpec("F8_E4M3", (high, wide)),
            "weight_scale": TensorSpec("U8" if scheme.format == MXFP8 else "F32", scale_shape),
        }
        outer = []
    if scheme.activations is not None and scheme.activations.tensor:
        outer.append(scheme.activations.tensor)
    return {**found, **{suffix: TensorSpec("F32", (1,)) for suffix in outer}}


def shape_of(tensors: Tensors, _bits: int) -> Shape:
    """(in, out), from headers."""
    packed = "weight_packed" in tensors
    out_features, columns = sizes_of(tensors["weight_packed" if packed else "weight"])
    return columns * (2 if packed else 1), out_features


def faults(shape: Shape, spec: LinearSpec, _storage: Storage, *, scheme: FloatScheme) -> list[Fault]:
    """Faults of other bits, and of input widths that groups of weights or inputs do not fill; blocks may be cut."""
    found = bits_faults(scheme.preset, (scheme.bits,), spec)
    rounded = scheme.activations.size if scheme.activations else 0
    size = scheme.group_size if scheme.strategy in ("group", "tensor_group") else rounded
    if size and shape[0] % size:
        fact = f"in_features={shape[0]} is no multiple of {size}, the groups of {scheme.preset}"
        found.append(Fault("width", fact, "leave it in float, or use method=fp8 method.scheme=dynamic"))
    return found


def _layout(scheme: FloatScheme) -> Layout:
    packed = scheme.format in (NVFP4, MXFP4)
    return Layout(
        name=scheme.layout,
        method=METHOD,
        tensors=TENSORS[scheme.format],
        codes="weight_packed" if packed else "weight",
        scales=tuple(name for name in ("weight_scale", "weight_global_scale") if name in TENSORS[scheme.format]),
        specs=partial(specs, scheme=scheme),
        shape=shape_of,
        faults=partial(faults, scheme=scheme),
        dequantize=partial(dequantize, scheme=scheme),
        config=ConfigSection(partial(section, scheme=scheme), config.info_of, names_tied_head=True),
        finder=partial(codes.scaled_linears, known=TENSORS[scheme.format]),
        activations=scheme.activations is not None,
    )


LAYOUTS: Mapping[str, Layout] = {scheme.layout: _layout(scheme) for scheme in SCHEMES.values()}
