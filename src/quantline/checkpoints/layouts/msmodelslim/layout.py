"""msModelSlim's three save modes as layouts: safe_tensor, ascendV1 (two 4-bit codes per byte) and that of the v1 saver.

They differ in the packing of 4-bit codes, and in the file names and the description. The v1 saver's can only be read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts.affine import AffineLinear
from quantline.checkpoints.layouts.checks import Tensors
from quantline.checkpoints.layouts.folder import FolderForm
from quantline.checkpoints.layouts.layout import (
    Affine,
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
from quantline.checkpoints.layouts.msmodelslim import codec, files
from quantline.checkpoints.layouts.msmodelslim.outliers import OutlierReport
from quantline.checkpoints.layouts.msmodelslim.tensors import NAMES
from quantline.checkpoints.safetensors_stream import TensorSpec

_TITLE, _OTHERS = "msModelSlim", "use gptq or compressed_tensors"


def _layout(variant: str, *, packs: bool, target: bool) -> Layout:
    """One save mode; packs: a byte holds two 4-bit codes."""
    name = NAMES[variant]
    read = partial(_read, packs)
    return Layout(
        name=name,
        method=codec.NAME,
        tensors=codec.TENSORS,
        codes="weight",
        scales=("weight_scale",),
        zeros=("weight_offset",),
        specs=partial(_specs, packs),
        shape=partial(_shape, packs),
        faults=partial(_faults, name, packs),
        dequantize=weights_of(read),
        affine=Affine(
            read, partial(_write, packs), rows_are_outputs=True, mend=partial(_mend, packs),
            outline=_outline, check_bytes=None if packs else _check_bytes,
        ),
        folder=FolderForm(
            files.recognises, files.plan, partial(_stem, variant), partial(_describe, variant), _carried_faults
        ),
        mixed=True,
        mixed_target=True,
        target=name if target else None,
        servable=False,
        nearest=_nearest,
    )  # fmt: skip


def _group_size(tensors: Tensors, group_size: int) -> int:
    """-1 if there is one scale per output channel; packed codes are then packed along the input."""
    scale, rows = tensors["weight_scale"], tensors["weight"].shape[0]
    return -1 if scale.size == rows and scale.shape[0] == rows else group_size


def _read(packs: bool, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
    own = _group_size(tensors, group_size)
    return codec.read(tensors, bits=bits, group_size=own, packed=packs and bits == 4)


def _mend(packs: bool, tensors: Tensors, *, bits: int, group_size: int) -> tuple[AffineLinear, OutlierReport]:
    own = _group_size(tensors, group_size)
    return codec.read_with_outliers(tensors, bits=bits, group_size=own, packed=packs and bits == 4)


def _write(packs: bool, linear: AffineLinear) -> dict[str, NDArray[Any]]:
    """A single group over the whole input is written as one scale per channel."""
    own = replace(linear, group_size=-1) if linear.groups == 1 else linear
    return codec.write(own, packed=packs and linear.bits == 4)


def _outline(
    partners: Tensors, *, out_features: int, spec: LinearSpec, mend: bool
) -> tuple[AffineLinear, OutlierReport | None]:
    """A linear with one column of zero codes per group has the same scales and offsets."""
    groups = partners["weight_scale"].size // out_features
    stored = {"weight": np.zeros((out_features, groups), dtype=np.int8), **partners}
    size = -1 if spec.group_size == -1 else 1
    if mend:
        return codec.read_with_outliers(stored, bits=spec.bits, group_size=size)
    return codec.read(stored, bits=spec.bits, group_size=size), None


def _check_bytes(low: int, high: int, bits: int) -> None:
    if bits == 4:
        codec.check_range(low, high)


def _specs(packs: bool, shape: Shape, spec: LinearSpec, storage: Storage) -> dict[str, TensorSpec]:
    (in_features, out_features), groups = shape, groups_of(shape, spec)
    packed = packs and spec.bits == 4
    along_in = packed and groups == 1
    codes = (out_features // (2 if packed and not along_in else 1), in_features // (2 if along_in else 1))
    scale = TensorSpec(storage.scale_dtype, (out_features, groups))
    return {"weight": TensorSpec("I8", codes), "weight_scale": scale, "weight_offset": scale}


def _shape(packs: bool, tensors: Tensors, bits: int) -> Shape:
    found = codec.geometry(sizes_of(tensors["weight"]), tensors["weight_scale"].shape, packs and bits == 4)
    return found.in_features, found.out_features


def _faults(name: str, packs: bool, shape: Shape, spec: LinearSpec, storage: Storage) -> list[Fault]:
    found = [*bits_faults(_TITLE, codec.BITS, spec), *order_faults(_TITLE, storage, _OTHERS)]
    if packs and spec.bits == 4:
        side, width = ("in_features", shape[0]) if groups_of(shape, spec) == 1 else ("out_features", shape[1])
        if width % 2:
            fact = f"{side}={width} does not fill whole words of {name}, which needs a multiple of 2"
            found.append(Fault("width", fact, "use compressed_tensors, or leave it in float"))
    return found


def _stem(variant: str, bits: Iterable[int]) -> str:
    return files.stem_of(bits, variant)


def _describe(variant: str, folder: Path, tensors: Mapping[str, LinearSpec | None]) -> None:
    schemes = {name: files.FLOAT if spec is None else files.scheme_of(spec.bits) for name, spec in tensors.items()}
    specs = {spec for spec in tensors.values() if spec is not None}
    files.write_description(
        folder, dict(sorted(schemes.items())), [spec.bits for spec in specs], max(spec.group_size for spec in specs),
        variant,
    )  # fmt: skip


def _carried_faults(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    vectors = {name for name, shape in shapes.items() if len(shape) == 1}
    return [
        f"{name}: is the bias of a norm, which readers of msModelSlim drop as one of anti-outlier m3; {_OTHERS}"
        for name in shapes
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in vectors
    ]


def _nearest(specs: Collection[LinearSpec], _symmetric: bool, _reordered: bool) -> str | None:
    return "awq_gemm" if {spec.bits for spec in specs} == {4} else "compressed_tensors"


SAFE_TENSOR = _layout(files.SAFE_TENSOR, packs=False, target=True)
ASCEND_V1 = _layout(files.ASCEND_V1, packs=True, target=True)
V1 = _layout(files.V1, packs=False, target=False)
