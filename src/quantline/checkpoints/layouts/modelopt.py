"""NVIDIA ModelOpt's checkpoints: FP8 with one scale a linear, and NVFP4. Read as weights, kept, never written.

The description is `hf_quant_config.json` (`quantization: {quant_algo, group_size, exclude_modules, ...}`), or the same in
config.json (`quant_method: modelopt`, `ignore`). Tensors of a linear with a weight (out, in), codes as in `float_codes`:

    FP8     weight F8_E4M3 (out, in), weight_scale F32 (), input_scale F32 ()
    NVFP4   weight U8 (out, in/2), weight_scale F8_E4M3 (out, in/16), weight_scale_2 F32 (), by which a scale is multiplied
            (compressed-tensors divides), input_scale F32 () likewise for inputs

A linear may have k_scale or v_scale, for a KV cache in FP8, which only servers use. Source: vLLM 0.32, `modelopt.py`, and
ModelOpt's `qtensor/nvfp4_tensor.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts import float_codes as codes
from quantline.checkpoints.layouts.checks import Tensors, check_suffixes
from quantline.checkpoints.layouts.description import Activations, Description, QuantizationInfo
from quantline.checkpoints.layouts.layout import ConfigSection, Fault, Layout, Shape, Storage, bits_faults, sizes_of
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.core.errors import CheckpointError

METHOD = "modelopt"
OWN_FILE = "hf_quant_config.json"
GROUP = 16
_OPTIONAL = {"input_scale": False, "k_scale": False, "v_scale": False, "bias": False}
_FP8: Mapping[str, bool] = {"weight": True, "weight_scale": True, **_OPTIONAL}
_NVFP4: Mapping[str, bool] = {"weight": True, "weight_scale": True, "weight_scale_2": True, **_OPTIONAL}
_FIXED = Activations("e4m3", "tensor", tensor="input_scale")
_LOCAL = Activations("e2m1", "group", GROUP, scales="e4m3", tensor="input_scale", multiplied=True)
# quant_algo -> layout, bits, group size, how inputs are rounded
_ALGORITHMS: Mapping[str, tuple[str, int, int, Activations | None]] = {
    "FP8": ("modelopt_fp8", 8, -1, _FIXED),
    "NVFP4": ("modelopt_nvfp4", 4, GROUP, _LOCAL),
    "W4A16_NVFP4": ("modelopt_nvfp4", 4, GROUP, None),
}


def _read_fp8(tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
    del bits, group_size
    check_suffixes(tensors, _FP8)
    values = codes.E4M3[codes.raw("weight", tensors["weight"], "F8_E4M3")]
    values *= codes.single("weight_scale", tensors["weight_scale"])
    return values


def _read_nvfp4(tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
    del bits, group_size
    check_suffixes(tensors, _NVFP4)
    values = codes.halves(codes.raw("weight", tensors["weight"], "U8"))
    scales = codes.E4M3[codes.raw("weight_scale", tensors["weight_scale"], "F8_E4M3")]
    return codes.grouped(values, scales * codes.single("weight_scale_2", tensors["weight_scale_2"]), GROUP)


def algorithm_of(section: Mapping[str, Any]) -> str:
    """`quant_algo` of a description, in either form; empty if it has none."""
    inner = section.get("quantization")
    place = inner if isinstance(inner, Mapping) else section
    return str(place.get("quant_algo") or "").upper()


def parse(path: Path, section: Mapping[str, Any]) -> QuantizationInfo:
    """Read a description.

    Raises:
        CheckpointError: another algorithm, or groups of another size.
    """

    def refuse(fact: str) -> NoReturn:
        raise CheckpointError(f"{path}: ModelOpt {fact}: known are {', '.join(_ALGORITHMS)}; use one of these")

    inner = section.get("quantization")
    place = inner if isinstance(inner, Mapping) else section
    known = _ALGORITHMS.get(algorithm_of(section))
    if known is None:
        refuse(f"with quant_algo {place.get('quant_algo')!r}")
    layout, bits, size, activations = known
    if size == GROUP and place.get("group_size") not in (None, GROUP):
        refuse(f"with groups of {place['group_size']!r}")
    left = place.get("exclude_modules") or place.get("ignore") or []
    if not isinstance(left, list) or not all(isinstance(name, str) for name in left):
        refuse(f"with exclude_modules {left!r}")
    return QuantizationInfo(
        method=METHOD, layout=layout, bits=bits, group_size=size, desc_act=False, symmetric=True,
        modules_to_not_convert=tuple(left), activations=activations,
    )  # fmt: skip


def _describe(_wanted: Description) -> dict[str, Any]:
    raise CheckpointError("ModelOpt's layouts are read and kept, not written; use compressed_tensors")


def _specs(shape: Shape, spec: LinearSpec, _storage: Storage) -> dict[str, TensorSpec]:
    wide, high = shape
    scalars = {"input_scale": TensorSpec("F32", ())}
    if spec.bits == 8:
        return {"weight": TensorSpec("F8_E4M3", (high, wide)), "weight_scale": TensorSpec("F32", ()), **scalars}
    return {
        "weight": TensorSpec("U8", (high, wide // 2)), "weight_scale": TensorSpec("F8_E4M3", (high, wide // GROUP)),
        "weight_scale_2": TensorSpec("F32", ()), **scalars,
    }  # fmt: skip


def _shape(tensors: Tensors, bits: int) -> Shape:
    high, columns = sizes_of(tensors["weight"])
    return columns * (2 if bits == 4 else 1), high


def _faults(_shape: Shape, spec: LinearSpec, _storage: Storage) -> list[Fault]:
    return bits_faults(METHOD, (4, 8), spec)


_SECTION = ConfigSection(_describe, parse, old_file=OWN_FILE)
FP8 = Layout(
    name="modelopt_fp8", method=METHOD, tensors=_FP8, codes="weight", scales=("weight_scale",), specs=_specs, shape=_shape,
    faults=_faults, dequantize=_read_fp8, config=_SECTION, finder=partial(codes.scaled_linears, known=_FP8),
    activations=True,
)  # fmt: skip
NVFP4 = Layout(
    name="modelopt_nvfp4", method=METHOD, tensors=_NVFP4, codes="weight", scales=("weight_scale", "weight_scale_2"),
    specs=_specs, shape=_shape, faults=_faults, dequantize=_read_nvfp4, config=_SECTION,
    finder=partial(codes.scaled_linears, known=_NVFP4), activations=True,
)  # fmt: skip
