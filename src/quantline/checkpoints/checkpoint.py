"""Reading checkpoints: from headers, without pickles, without a deep-learning framework.

A folder holds `model.safetensors`, or shards named by `model.safetensors.index.json`, and a `config.json` that says
whether and how its linears are quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts import LAYOUTS, FormatError, bitsandbytes, dequantize
from quantline.checkpoints.quantization_config import QuantizationInfo, quantization_of
from quantline.checkpoints.safetensors_file import (
    SafetensorsFile,
    TensorInfo,
    read_header,
    read_index,
    safetensors_dtype,
    to_float32,
    write_safetensors,
)
from quantline.core.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "QuantizationInfo",
    "TensorInfo",
    "dequantized",
    "iter_dequantized",
    "quantization_of",
    "quantized_layers",
    "read_header",
    "to_float32",
    "write_safetensors",
]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened folder. Tensors are memory-mapped when they are asked for; build it with `Checkpoint.open`."""

    folder: Path
    shards: Mapping[str, str]  # tensor name -> file name
    _infos: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Check every header and open the folder.

        Raises:
            CheckpointError: no weights, pickled weights only, a missing or damaged shard, an index that does not agree
                with its shards or names files outside the folder.
        """
        folder = Path(folder)
        single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
        if single.exists() and index.exists():
            raise CheckpointError(f"{folder}: has {WEIGHTS_NAME} and {INDEX_NAME}: remove the one that is out of date")
        if single.exists():
            infos = read_header(single)
            return cls(folder, dict.fromkeys(sorted(infos), WEIGHTS_NAME), infos)
        if index.exists():
            return cls(folder, *read_index(index))
        raise CheckpointError(_no_weights(folder))

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self.shards)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.folder}: has no tensor {name}: check the name against `names`")
        return self._infos[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of the file's bytes, in the dtype that `numpy_dtype` gives.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self.info(name)
        return SafetensorsFile(self.folder / self.shards[name], self._infos).view(name)


def quantized_layers(checkpoint: Checkpoint, info: QuantizationInfo | None) -> dict[str, dict[str, str]]:
    """The quantized linears of a checkpoint: layer name -> tensor suffix -> tensor name.

    Raises:
        CheckpointError: config and tensors disagree: packed tensors in a float checkpoint, none in a quantized one,
            an incomplete layer, or a layer that is also there in float.
    """
    if info is not None and info.layout == bitsandbytes.NAME:
        return _bitsandbytes_layers(checkpoint)
    # Without a config, what gives a packed linear away are the codes of GPTQ and AWQ, or the scales of others.
    marks = {**LAYOUTS["gptq"].TENSORS, "weight_scale": True, "absmax": True, "SCB": True}
    known = LAYOUTS[info.layout].TENSORS if info else marks
    names = set(checkpoint.names)
    packed = [suffix for suffix in known if suffix not in ("weight", "bias")]  # float layers have those as well
    layers = sorted({name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in packed})
    if "weight" in known:  # a layout whose codes have the float weight's name: only their dtype tells them apart
        codes = {name.removesuffix(".weight") for name in names if name.endswith(".weight")} - set(layers)
        layers = sorted([*layers, *(layer for layer in codes if checkpoint.info(f"{layer}.weight").dtype == "I8")])
    if info is None:
        if layers:
            raise CheckpointError(
                f"{checkpoint.folder}: {layers[0]} is packed, config.json says float: restore the config"
            )
        return {}
    if not layers:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says {info.method}, no linear is packed: quantize it again"
        )
    found = {}
    for layer in layers:
        missing = [suffix for suffix, required in known.items() if required and f"{layer}.{suffix}" not in names]
        if missing:
            raise CheckpointError(f"{checkpoint.folder}: {layer} lacks {', '.join(missing)}: fetch or write it again")
        if "weight" not in known and f"{layer}.weight" in names:
            raise CheckpointError(
                f"{checkpoint.folder}: {layer} is there packed and as float weight: remove one of them"
            )
        found[layer] = {suffix: f"{layer}.{suffix}" for suffix in known if f"{layer}.{suffix}" in names}
    return found


def _bitsandbytes_layers(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    try:
        layers = bitsandbytes.layers(checkpoint.names)
    except FormatError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    if not layers:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says bitsandbytes, no linear is packed: quantize it again"
        )
    return layers


def iter_dequantized(folder: str | Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every parameter of a checkpoint under its float name, one at a time, in float32.

    A quantized linear X gives ``X.weight`` (out, in), exactly what its codes stand for; everything else, biases
    included, comes under its own name. Some quantizers add an all-zero bias to layers that have none: the caller, who
    knows the model, decides about those.

    Raises:
        CheckpointError: anything about folder, config or a layer is inconsistent.
    """
    checkpoint, info = Checkpoint.open(folder), quantization_of(folder)
    layers = quantized_layers(checkpoint, info)
    if info is not None:
        for layer, suffixes in layers.items():
            yield f"{layer}.weight", dequantized(checkpoint, info, layer, suffixes)
    packed = {name for suffixes in layers.values() for suffix, name in suffixes.items() if suffix != "bias"}
    for name in checkpoint.names:
        if name not in packed:
            yield name, to_float32(checkpoint.tensor(name))


def dequantized(
    checkpoint: Checkpoint, info: QuantizationInfo, layer: str, suffixes: Mapping[str, str]
) -> NDArray[np.float32]:
    """The weight (out, in) that one quantized linear's codes stand for.

    Args:
        suffixes: tensor suffix -> tensor name, as from `quantized_layers`.

    Raises:
        CheckpointError: its tensors do not make a linear of the layout.
    """
    settings = info.of(layer)
    try:
        if info.layout == bitsandbytes.NAME:
            raw = {suffix: checkpoint.tensor(name) for suffix, name in suffixes.items()}
            return bitsandbytes.dequantize(raw, bits=settings.bits)
        tensors = {suffix: _plain(checkpoint.tensor(name)) for suffix, name in suffixes.items()}
        linear = LAYOUTS[info.layout].read(tensors, bits=settings.bits, group_size=settings.group_size)
    except FormatError as error:
        raise CheckpointError(f"{checkpoint.folder}: {layer}: {error}") from error
    return dequantize(linear)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 widened here, where it is decoded with or without ml_dtypes."""
    return to_float32(array) if safetensors_dtype(array.dtype) == "BF16" else array


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is not a folder: check the path"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return f"{folder}: holds pickled weights only ({pickled[0]}), which can run code: save it as safetensors"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"{folder}: holds {others[0]}, neither {WEIGHTS_NAME} nor {INDEX_NAME}: rename it, or fetch the index"
    return f"{folder}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}: download the model first"
