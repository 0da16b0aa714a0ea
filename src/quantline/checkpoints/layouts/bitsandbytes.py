"""The serialized form of bitsandbytes: 4-bit blocks on a table of 16 values (NF4, FP4), and LLM.int8.

Its codes are not on an even grid with a zero point, so no `AffineLinear` can hold them: they are read as weights, and no
layout can be converted to or from it. Tensors of a linear X with a weight (out, in), as transformers loads them:

    4 bits  X.weight                                  uint8 (out * in / 2, 1), first weight in the high half of a byte
            X.weight.absmax                           float32 (blocks,), or uint8 (blocks,) if quantized again
            X.weight.quant_map                        float32 (16,), the table
            X.weight.nested_absmax                    float32 (blocks / 256,)      only if quantized again
            X.weight.nested_quant_map                 float32 (256,)               only if quantized again
            X.weight.quant_state.bitsandbytes__nf4    uint8, JSON: quant_type, blocksize, dtype, shape, nested_*
    8 bits  X.weight int8 (out, in), X.SCB float32 (out,), X.weight_format uint8 (), 0

Blocks run over the weight in C order. A weight is ``table[code] * scale[block]``, with the product rounded to float32 and
then to the dtype in the state. A scale quantized again is ``nested_table[c] * nested_absmax[block / 256] + offset``.
An 8-bit weight is ``code * SCB[row] * (1 / 127)``, in float32 and from left to right.

The weights equal those of `dequantize_4bit` and `int8_vectorwise_dequant` of bitsandbytes 0.50.2 on a CPU bit for bit. Its
matrix products round further: at 8 bits, activations are quantized too, except for outliers; with AVX512-BF16, 4-bit ones
compute in bfloat16, scales included. Source: its functional.py, nn/modules.py and backends/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.checks import check_shape
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.layout import ConfigSection, Fault, Found, Layout, Shape, Storage, bits_faults
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_stream import TensorSpec
from quantline.core.errors import CheckpointError

NAME = "bitsandbytes"
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64
# In config.json; transformers takes the size from the tensors and ignores unknown keys.
BLOCK_SIZE_KEY = "bnb_4bit_blocksize"

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)  # fmt: skip
_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=np.float32) / np.float32(12.0)
FP4 = np.concatenate([_FP4, -_FP4])
TABLES: Mapping[str, NDArray[np.float32]] = {"nf4": NF4, "fp4": FP4}

_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_NESTED_BLOCK = 256
# The tensor by which a linear is found -> its required tensors, at 4 and at 8 bits.
_MARKS = {"weight.absmax": ("weight", "weight.absmax", "weight.quant_map"), "SCB": ("weight", "SCB")}
# suffix -> required; which optional ones exist depends on bits and options, see `find`.
TENSORS: Mapping[str, bool] = {
    "weight": True, "weight.absmax": False, "weight.quant_map": False, **dict.fromkeys(_NESTED, False),
    f"{_STATE}nf4": False, f"{_STATE}fp4": False, "SCB": False, "weight_format": False, "bias": False,
}  # fmt: skip
_PER_127 = np.float32(7.874015718698502e-3)
# Codes dequantized at a time; limits the temporaries.
_PIECE = 1 << 22

Raw = Mapping[str, NDArray[Any]]


def find(names: Iterable[str]) -> dict[str, Found]:
    """The quantized linears among tensor names."""
    found: dict[str, Found] = {}
    everything = set(names)
    for name in sorted(everything):
        mark = next((mark for mark in _MARKS if name.endswith(f".{mark}")), None)
        if mark is None:
            continue
        layer = name.removesuffix(f".{mark}")
        needed = _MARKS[mark]
        state = [f"{_STATE}{kind}" for kind in TABLES if f"{layer}.{_STATE}{kind}" in everything]
        missing = [suffix for suffix in needed if f"{layer}.{suffix}" not in everything]
        if mark != "SCB" and len(state) != 1:
            missing.append(f"{_STATE}nf4 or fp4")
        known = (*needed, *state, *(("weight_format",) if mark == "SCB" else _NESTED), "bias")
        tensors = {suffix: f"{layer}.{suffix}" for suffix in known if f"{layer}.{suffix}" in everything}
        found[layer] = Found(tensors, tuple(missing))
    return found


def dequantize(tensors: Raw, *, bits: int, group_size: int = -1) -> NDArray[np.float32]:
    """One layer's weight, float32 (out, in), as the library reads it.

    Args:
        tensors: by suffix as `find` gives them, in the dtypes of the file.
        bits: 4 or 8.
        group_size: not used; at 4 bits the tensors contain the block size.

    Raises:
        FormatError: the tensors do not fit a layer of these bits.
    """
    del group_size
    if bits == 8:
        return _dequantize_8bit(tensors)
    if bits != 4:
        raise FormatError(f"bits={bits}: bitsandbytes supports 4 or 8")
    state = read_state(tensors)
    rows, columns = state["shape"]
    count, block = rows * columns, state["blocksize"]
    scales = _scales(tensors, state)
    check_shape("weight.absmax", scales, (-(-count // block),))
    packed = np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    check_shape("weight", packed, (-(-count // 2),))
    table = TABLES[state["quant_type"]]
    stored = np.asarray(tensors["weight.quant_map"], dtype=np.float32)
    if stored.shape != (16,) or not np.allclose(stored, table, rtol=0, atol=1e-6):
        raise FormatError(
            f"weight.quant_map is not the table of {state['quant_type']}, which readers use: write it again"
        )
    pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1)  # (256, 2), by byte
    rounded = _rounding(state["dtype"])
    result = np.empty(count, dtype=np.float32)
    piece = _PIECE // block * block  # codes, whole blocks and whole bytes
    for start in range(0, count, piece):
        stop = min(start + piece, count)
        values = pairs[packed[start // 2 : -(-stop // 2)]].reshape(-1)[: stop - start]
        own = np.repeat(scales[start // block : -(-stop // block)], block)[: stop - start]
        result[start:stop] = rounded(values * own)
    return result.reshape(rows, columns)


def read_state(tensors: Raw) -> dict[str, Any]:
    """The JSON of a 4-bit layer: quant_type, blocksize, dtype, shape, and nested_* where scales were quantized again.

    Raises:
        FormatError: the JSON is missing, or has invalid values.
    """
    key = next((suffix for suffix in tensors if suffix.startswith(_STATE)), None)
    if key is None:
        raise FormatError(f"{_STATE}nf4 or fp4 is missing: it is not a 4-bit layer")
    try:
        state = json.loads(np.ascontiguousarray(tensors[key]).tobytes().decode())
        kind, block, shape, dtype = (state[name] for name in ("quant_type", "blocksize", "shape", "dtype"))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{key} cannot be read ({error}): write the checkpoint again") from error
    if kind not in TABLES or key != f"{_STATE}{kind}":
        raise FormatError(f"{key} has the type {kind!r}: supported are {' and '.join(TABLES)}")
    if type(block) is not int or block < 2 or block % 2:
        raise FormatError(f"{key} has the block size {block!r}: it must be an even number, such as 64")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise FormatError(f"{key} has the shape {shape!r}: a linear's weight has two sizes")
    if dtype not in _ROUNDINGS:
        raise FormatError(f"{key} has the dtype {dtype!r}: supported are {', '.join(_ROUNDINGS)}")
    return dict(state)


def shape_of(tensors: Raw, bits: int) -> tuple[int, int]:
    """(out_features, in_features) of a layer.

    Raises:
        FormatError: as `read_state`.
    """
    rows, columns = tensors["weight"].shape if bits == 8 else read_state(tensors)["shape"]
    return int(rows), int(columns)


def describe(
    *, bits: int, block_size: int, quant_type: str, double_quant: bool, modules_to_not_convert: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` section, with the keys of transformers' BitsAndBytesConfig.

    block_size, quant_type and double_quant apply to 4 bits. The compute dtype is float16, the dtype of the tensors in float.
    """
    config = {
        "quant_method": NAME,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(modules_to_not_convert),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
    if bits == 4:
        config |= {
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": "float16",
            "bnb_4bit_quant_storage": "uint8",
            BLOCK_SIZE_KEY: block_size,
        }
    return config


def parse(config: Mapping[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    """Bits, block size (-1 at 8 bits: one scale a row) and modules left in float, from a `quantization_config`.

    Raises:
        FormatError: it sets neither 4 nor 8 bits, or both, or the block size is invalid.
    """
    four, eight = (bool(config.get(key, config.get(f"_{key}"))) for key in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise FormatError("set either load_in_4bit or load_in_8bit: correct quantization_config")
    skipped = config.get("llm_int8_skip_modules") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise FormatError(f"llm_int8_skip_modules is {skipped!r}: it must be a list of names")
    if eight:
        return 8, -1, tuple(skipped)
    block = config.get(BLOCK_SIZE_KEY, DEFAULT_BLOCK_SIZE)
    if type(block) is not int or block < 2:
        raise FormatError(f"{BLOCK_SIZE_KEY} is {block!r}: it must be a number such as 64")
    return 4, block, tuple(skipped)


def _dequantize_8bit(tensors: Raw) -> NDArray[np.float32]:
    codes, scales = tensors["weight"], tensors["SCB"]
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise FormatError(f"weight is {codes.dtype} {codes.shape}: 8-bit layers store int8 (out, in)")
    check_shape("SCB", scales, codes.shape[:1])
    if "weight_format" in tensors and int(tensors["weight_format"].reshape(-1)[0]) != 0:
        raise FormatError(
            "weight_format is not 0: only row-major weights can be read; save it with a recent bitsandbytes"
        )
    result: NDArray[np.float32] = codes * scales.astype(np.float32)[:, None]
    result *= _PER_127
    return result


def _scales(tensors: Raw, state: Mapping[str, Any]) -> NDArray[np.float32]:
    """float32 (blocks,)."""
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        if absmax.dtype.kind != "f":
            raise FormatError(f"weight.absmax is {absmax.dtype} and weight.nested_absmax is missing: fetch it again")
        return absmax.astype(np.float32)
    missing = [suffix for suffix in _NESTED if suffix not in tensors]
    block = state.get("nested_blocksize", _NESTED_BLOCK)
    if missing or absmax.dtype != np.uint8 or "nested_offset" not in state or type(block) is not int or block < 1:
        raise FormatError("scales that were quantized again are incomplete: fetch or write the layer again")
    table, outer = (tensors[suffix].astype(np.float32) for suffix in reversed(_NESTED))
    check_shape("weight.nested_quant_map", table, (256,))
    check_shape("weight.nested_absmax", outer, (-(-absmax.size // block),))
    return table[absmax] * np.repeat(outer, block)[: absmax.size] + np.float32(state["nested_offset"])


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest bfloat16, ties to even; for finite values."""
    words = values.view(np.uint32)
    nearest = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return nearest.view(np.float32)


_ROUNDINGS: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "float32": lambda values: values,
    "float16": _half,
    "bfloat16": _bfloat16,
}


def _rounding(dtype: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    return _ROUNDINGS[dtype]


def specs(shape: Shape, spec: LinearSpec, storage: Storage) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor except the JSON, whose length varies (some hundred bytes)."""
    values = shape[0] * shape[1]
    if spec.bits == 8:
        return {
            "weight": TensorSpec("I8", (shape[1], shape[0])),
            "SCB": TensorSpec("F32", (shape[1],)),
            "weight_format": TensorSpec("U8", ()),
        }
    blocks = -(-values // spec.group_size)
    found = {"weight": TensorSpec("U8", (values // 2, 1)), "weight.quant_map": TensorSpec("F32", (16,))}
    if not storage.double_quant:
        return {**found, "weight.absmax": TensorSpec("F32", (blocks,))}
    return {
        **found,
        "weight.absmax": TensorSpec("U8", (blocks,)),
        "weight.nested_absmax": TensorSpec("F32", (-(-blocks // _NESTED_BLOCK),)),
        "weight.nested_quant_map": TensorSpec("F32", (256,)),
    }


def _faults(_shape: Shape, spec: LinearSpec, _storage: Storage) -> list[Fault]:
    return bits_faults(NAME, (4, 8), spec)


def _shape(tensors: Raw, bits: int) -> Shape:
    rows, columns = shape_of(tensors, bits)
    return columns, rows


def _section(wanted: Description) -> dict[str, Any]:
    return describe(
        bits=wanted.main.bits, block_size=wanted.main.group_size,
        quant_type=str(wanted.options.get("quant_type", "nf4")),
        double_quant=bool(wanted.options.get("double_quant", True)), modules_to_not_convert=wanted.left_float,
    )  # fmt: skip


def _info(path: Path, config: Mapping[str, Any]) -> QuantizationInfo:
    try:
        bits, group_size, skipped = parse(config)
    except FormatError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return QuantizationInfo(
        method=NAME, layout=NAME, bits=bits, group_size=group_size, desc_act=False, symmetric=True,
        modules_to_not_convert=skipped,
    )  # fmt: skip


LAYOUT = Layout(
    name=NAME,
    method=NAME,
    tensors=TENSORS,
    codes="weight",
    scales=("weight.absmax", "weight.nested_absmax", "SCB"),
    specs=specs,
    shape=_shape,
    faults=_faults,
    dequantize=dequantize,
    config=ConfigSection(_section, _info),
    finder=find,
    marks=tuple(_MARKS),
)
