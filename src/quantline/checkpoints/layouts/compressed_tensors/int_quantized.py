"""compressed-tensors ``int-quantized``: for kernels that also quantize activations to 8 bits (W8A8 and W4A8).

``w = q * s`` with signed codes ``q`` of 8 bits and one scale per output channel, or of 4 bits, one a byte, in groups. In
`AffineLinear`, ``u = q + 2**(b-1)``, which is also every zero point. The runtime quantizes the inputs of these linears with
one scale per token, which no tensor holds; the config says so (`compressed_tensors.config`).

Tensors of a layer, output rows first:
    weight        int8 (out, in)          codes
    weight_scale  float16/32 (out, in/g)  (out, 1) per output channel; in the dtype of the model
    bias          float16/32 (out,)       optional

Source: the compressed-tensors package 0.19 (Apache-2.0), whose reader the tests compare with this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.affine import AffineLinear, group_count, sequential_groups
from quantline.checkpoints.layouts.checks import Tensors, as_float, bias_of, check_shape, check_suffixes
from quantline.checkpoints.layouts.compressed_tensors import config
from quantline.checkpoints.layouts.layout import (
    Affine,
    ConfigSection,
    Fault,
    Layout,
    Shape,
    Storage,
    bits_faults,
    groups_of,
    order_faults,
    sizes_of,
    weights_of,
)
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_stream import TensorSpec

NAME = "compressed_tensors_int"
BITS = (4, 8)

# suffix -> required
TENSORS: Mapping[str, bool] = {"weight": True, "weight_scale": True, "bias": False}


def read(tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    """Read one layer; ``tensors`` is keyed by suffix and stays unchanged.

    Raises:
        FormatError: tensors are missing or unknown, codes are not int8 or exceed their bits, or scales have another shape.
    """
    check_suffixes(tensors, TENSORS)
    _check(bits, group_size)
    weight = tensors["weight"]
    if weight.dtype != np.int8 or weight.ndim != 2 or not weight.size:
        raise FormatError(f"weight is {weight.dtype} {weight.shape}: this layout stores a non-empty int8 (out, in)")
    out_features, in_features = weight.shape
    groups, middle = group_count(in_features, group_size), 2 ** (bits - 1)
    check_shape("weight_scale", tensors["weight_scale"], (out_features, groups))
    return AffineLinear(
        codes=(weight.view(np.uint8) + np.uint8(middle)).T,  # modulo 256; column-major, not copied
        scales=np.ascontiguousarray(as_float("weight_scale", tensors["weight_scale"]).T),
        zeros=np.full((groups, out_features), middle, dtype=np.int16),
        group_index=sequential_groups(in_features, group_size),
        bits=bits,
        group_size=group_size,
        bias=bias_of(tensors),
    )


def write(linear: AffineLinear) -> dict[str, NDArray[Any]]:
    """Write one layer, keyed by suffix.

    Raises:
        FormatError: other bits, several groups at 8 bits, reordered groups, or zero points other than the middle.
    """
    _check(linear.bits, linear.group_size)
    if not linear.symmetric or not linear.sequential:
        fact = "zero points differ from the middle" if not linear.symmetric else "groups are reordered"
        raise FormatError(f"{fact}, which this layout cannot store: use compressed_tensors")
    codes = np.ascontiguousarray(linear.codes.T)
    tensors: dict[str, NDArray[Any]] = {
        "weight": (codes - np.uint8(2 ** (linear.bits - 1))).view(np.int8),
        "weight_scale": np.ascontiguousarray(linear.scales.T),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.copy()
    return tensors


def _check(bits: int, group_size: int) -> None:
    if bits not in BITS or (bits == 8 and group_size != -1):
        raise FormatError(
            f"bits={bits} group_size={group_size}: this layout stores 4 bits, or 8 bits with one scale per output channel "
            "(-1); use compressed_tensors"
        )


def specs(shape: Shape, spec: LinearSpec, storage: Storage) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor that `write` gives."""
    in_features, out_features = shape
    return {
        "weight": TensorSpec("I8", (out_features, in_features)),
        "weight_scale": TensorSpec(storage.scale_dtype, (out_features, groups_of(shape, spec))),
    }


def shape_of(tensors: Tensors, _bits: int) -> Shape:
    """(in, out), from headers."""
    out_features, in_features = sizes_of(tensors["weight"])
    return in_features, out_features


def faults(_shape: Shape, spec: LinearSpec, storage: Storage) -> list[Fault]:
    """Faults of anything but 4 bits, or 8 bits with one scale per output channel."""
    found = [*bits_faults(NAME, BITS, spec), *order_faults(NAME, storage, "use gptq or compressed_tensors")]
    if spec.bits == 8 and spec.group_size != -1:
        fact = f"has groups of {spec.group_size}, but {NAME} stores one scale per output channel (-1) at 8 bits"
        found.append(Fault("groups", fact, "use compressed_tensors"))
    return found


LAYOUT = Layout(
    name=NAME,
    method=config.METHOD,
    tensors=TENSORS,
    codes="weight",
    scales=("weight_scale",),
    specs=specs,
    shape=shape_of,
    faults=faults,
    dequantize=weights_of(read),
    affine=Affine(read, write, rows_are_outputs=True),
    config=ConfigSection(partial(config.section, activations=config.INT8), config.info_of, names_tied_head=True),
    activations=True,
)
