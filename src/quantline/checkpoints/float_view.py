"""A checkpoint as a float model: its parameters by their float names, with their shapes from the headers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, dequantized, plain, quantized_layers
from quantline.checkpoints.layouts import LAYOUTS, FormatError
from quantline.checkpoints.quantization_config import QuantizationInfo, quantization_of
from quantline.checkpoints.safetensors_file import to_float32
from quantline.core.errors import CheckpointError

# Scales of keys and values that a server keeps in FP8: of no model, so no parameters. ModelOpt names them inside k_proj and
# v_proj, also where these are float.
_CACHE = re.compile(r"\.(?:(?:self_attn|attention)\.[qkv]_scale|[kv]_proj\.[kv]_scale)$")


def is_cache_scale(name: str) -> bool:
    """Whether a tensor of a quantized checkpoint is a scale of the keys or values that a server keeps."""
    return bool(_CACHE.search(name))


@dataclass(frozen=True, eq=False)
class FloatView:
    """An opened checkpoint; create it with `FloatView.open`. Weights are read when they are asked for.

    A quantized linear X gives ``X.weight`` (out, in), exactly as its codes define it. Everything else, biases included,
    keeps its name, but for the scales of a KV cache, which only servers use. Some quantizers add an all-zero bias to layers
    that have none: the caller, who knows the model, decides about those.

    Attributes:
        checkpoint: its files.
        info: how it is quantized; None if it is float.
        quantized: its quantized linears, name -> tensor suffix -> tensor name.
        names: float name -> the tensor of that name, or None for the weight of a quantized linear.
    """

    checkpoint: Checkpoint
    info: QuantizationInfo | None
    quantized: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str | None]

    @classmethod
    def open(cls, folder: str | Path, info: QuantizationInfo | None = None) -> FloatView:
        """Read the headers and config.json of a folder.

        info: how it is quantized, in the place of what config.json says.

        Raises:
            CheckpointError: the folder, the config or a layer is inconsistent.
        """
        checkpoint, info = Checkpoint.open(folder), info or quantization_of(folder)
        quantized = quantized_layers(checkpoint, info)
        packed = {name for suffixes in quantized.values() for suffix, name in suffixes.items() if suffix != "bias"}
        weights: dict[str, str | None] = dict.fromkeys(f"{layer}.weight" for layer in quantized)
        floats = {name: name for name in checkpoint.names if name not in packed and not (info and is_cache_scale(name))}
        return cls(checkpoint, info, quantized, weights | floats)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading its values.

        Raises:
            CheckpointError: there is no such parameter, or its tensors do not fit the layout.
        """
        stored = self._stored(name)
        if stored is not None:
            return self.checkpoint.info(stored).shape
        layer = name.removesuffix(".weight")
        info = self._info()
        tensors = {suffix: plain(self.checkpoint.tensor(tensor)) for suffix, tensor in self.quantized[layer].items()}
        try:
            return LAYOUTS[info.layout].shape(tensors, info.of(layer).bits)[::-1]
        except FormatError as error:
            raise CheckpointError(f"{self.checkpoint.folder}: {layer}: {error}") from error

    def read(self, name: str) -> NDArray[Any]:
        """The values of a parameter: of a quantized linear in float32, of others as they are stored, read-only.

        Raises:
            CheckpointError: there is no such parameter, or its tensors do not fit the layout.
        """
        stored = self._stored(name)
        if stored is not None:
            return self.checkpoint.tensor(stored)
        layer = name.removesuffix(".weight")
        return dequantized(self.checkpoint, self._info(), layer, self.quantized[layer])

    def values(self, name: str) -> NDArray[np.float32]:
        """The values of a parameter in float32; may be a read-only view of the file."""
        return to_float32(self.read(name))

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Every parameter, one at a time, in float32."""
        return ((name, self.values(name)) for name in self.names)

    def _stored(self, name: str) -> str | None:
        if name not in self.names:
            raise CheckpointError(f"{self.checkpoint.folder}: has no parameter {name}: check the name against `names`")
        return self.names[name]

    def _info(self) -> QuantizationInfo:
        assert self.info is not None, "a float checkpoint has no quantized linears"
        return self.info


def iter_dequantized(folder: str | Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every parameter of a checkpoint under its float name, one at a time, in float32; see `FloatView`.

    Raises:
        CheckpointError: the folder, the config or a layer is inconsistent.
    """
    yield from FloatView.open(folder)
