"""Reads checkpoints from their headers, without pickles and without a deep-learning framework.

A folder holds `model.safetensors`, or shards named by `model.safetensors.index.json`, and a `config.json` that says
whether and how the linears are quantized. In place of safetensors it may hold one GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts import LAYOUTS, FormatError
from quantline.checkpoints.layouts.gguf.header import SUFFIX as GGUF
from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.checkpoints.layouts.gguf.names import Change, parameters
from quantline.checkpoints.layouts.layout import Found
from quantline.checkpoints.layouts.registry import packed_linear
from quantline.checkpoints.model_files import INDEX_NAME, WEIGHTS_NAME, no_weights
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
    "linears_of",
    "plain",
    "quantization_of",
    "quantized_layers",
    "read_header",
    "to_float32",
    "write_safetensors",
]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened folder. Tensors are memory-mapped on access; create it with `Checkpoint.open`."""

    folder: Path
    shards: Mapping[str, str]  # tensor name -> file name
    _infos: Mapping[str, TensorInfo]
    _changes: Mapping[str, Change] = field(default_factory=dict)  # what is undone as a tensor is read

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Check every header and open the folder.

        Raises:
            CheckpointError: no weights, pickled weights only, a missing or damaged shard, an index that contradicts
                its shards or names files outside the folder.
        """
        folder = Path(folder)
        single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
        if single.exists() and index.exists():
            raise CheckpointError(f"{folder}: has {WEIGHTS_NAME} and {INDEX_NAME}: remove the outdated one")
        if single.exists():
            infos = read_header(single)
            return cls(folder, dict.fromkeys(sorted(infos), WEIGHTS_NAME), infos)
        if index.exists():
            return cls(folder, *read_index(index))
        if files := sorted(folder.glob(f"*{GGUF}")):
            return cls._of_gguf(folder, files)
        raise CheckpointError(_no_weights(folder))

    @classmethod
    def _of_gguf(cls, folder: Path, files: Sequence[Path]) -> Checkpoint:
        if len(files) > 1:
            raise CheckpointError(f"{folder}: has {len(files)} GGUF files: leave one of them")
        found = parameters(read_gguf(files[0]))
        changes = {name: one.change for name, one in found.items() if one.change is not None}
        infos = {name: one.info for name, one in sorted(found.items())}
        return cls(folder, dict.fromkeys(infos, files[0].name), infos, changes)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self.shards)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and offset of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.folder}: has no tensor {name}: check the name against `names`")
        return self._infos[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of the file's bytes, in the dtype that `numpy_dtype` gives.

        Of a GGUF file, what its converter changed is undone, in a copy.

        Raises:
            CheckpointError: there is no such tensor.
        """
        self.info(name)
        stored = SafetensorsFile(self.folder / self.shards[name], self._infos).view(name)
        change = self._changes.get(name)
        return stored if change is None else change(stored)


def quantized_layers(checkpoint: Checkpoint, info: QuantizationInfo | None) -> dict[str, dict[str, str]]:
    """The quantized linears of a checkpoint: layer name -> tensor suffix -> tensor name.

    Raises:
        CheckpointError: config and tensors disagree: packed tensors in a float checkpoint, none in a quantized one,
            an incomplete layer, or a layer that also has a float weight.
    """
    if info is None:
        packed = packed_linear(checkpoint.names)
        if packed is not None:
            raise CheckpointError(
                f"{checkpoint.folder}: {packed} is packed, but config.json says float: restore config.json"
            )
        return {}
    layers = linears_of(checkpoint, info.layout)
    if not layers:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says {info.method}, but no linear is packed: quantize it again"
        )
    for layer, found in layers.items():
        if found.missing:
            raise CheckpointError(
                f"{checkpoint.folder}: {layer} lacks {', '.join(found.missing)}: fetch or write it again"
            )
        if found.also_float:
            raise CheckpointError(
                f"{checkpoint.folder}: {layer} has packed tensors and a float weight: remove one of them"
            )
    return {layer: dict(found.tensors) for layer, found in layers.items()}


def linears_of(checkpoint: Checkpoint, layout: str) -> dict[str, Found]:
    """The linears of a layout, complete or not, by name."""
    return LAYOUTS[layout].linears({name: checkpoint.info(name).dtype for name in checkpoint.names})


def dequantized(
    checkpoint: Checkpoint, info: QuantizationInfo, layer: str, suffixes: Mapping[str, str]
) -> NDArray[np.float32]:
    """The dequantized weight (out, in) of one linear.

    Args:
        suffixes: tensor suffix -> tensor name, as from `quantized_layers`.

    Raises:
        CheckpointError: its tensors do not fit the layout.
    """
    settings = info.of(layer)
    tensors = {suffix: plain(checkpoint.tensor(name)) for suffix, name in suffixes.items()}
    try:
        return LAYOUTS[info.layout].dequantize(tensors, bits=settings.bits, group_size=settings.group_size)
    except FormatError as error:
        raise CheckpointError(f"{checkpoint.folder}: {layer}: {error}") from error


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 widened to float32, which works without ml_dtypes; other dtypes as they are."""
    return to_float32(array) if safetensors_dtype(array.dtype) == "BF16" else array


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is not a folder: check the path"
    return no_weights(str(folder), [path.name for path in folder.iterdir()], read=folder.joinpath)
