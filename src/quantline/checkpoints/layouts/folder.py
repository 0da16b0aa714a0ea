"""Checkpoints that config.json does not describe: the contents of such a folder, and how to write one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_file import TensorInfo


@dataclass(frozen=True)
class FolderFault:
    """Why a checkpoint cannot be read: the tensor or module, the fault and the remedy."""

    tensor: str
    fact: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.fact}: {self.remedy}"


@dataclass(frozen=True)
class FolderLinear:
    """One quantized linear.

    Attributes:
        layout: key in `layouts.LAYOUTS` of this linear's tensors.
        bits: of a weight.
        group_size: input columns per group; -1 per output channel.
        out_features, in_features: of the linear.
        tensors: suffix -> tensor name. Its bias, which stays float, is among the carried tensors.
    """

    layout: str
    bits: int
    group_size: int
    out_features: int
    in_features: int
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class FolderContents:
    """The contents of a folder, from its headers and description.

    Attributes:
        folder: where it is.
        layout: key in `layouts.LAYOUTS` of the folder as a whole.
        variant: the save mode, as its tool calls it.
        description: file name of the description.
        files: tensor name -> file name, all tensors of the folder.
        infos: tensor name -> dtype, shape and offset in its file.
        layers: module name -> quantized linear.
        carried: output name -> source tensor, for tensors that are copied unchanged.
        dropped: source tensor -> why it is not used.
        float_linears: modules with a float weight matrix, embeddings left out (by "embed" or "wte" in the name).
        refusals: the reasons why it cannot be read; use `layers` only if there are none.
    """

    folder: Path
    layout: str
    variant: str
    description: str
    files: Mapping[str, str]
    infos: Mapping[str, TensorInfo]
    layers: Mapping[str, FolderLinear]
    carried: Mapping[str, str]
    dropped: Mapping[str, str]
    float_linears: tuple[str, ...]
    refusals: tuple[FolderFault, ...]


@dataclass(frozen=True)
class FolderForm:
    """Functions to recognise, read and describe folders of a layout.

    Attributes:
        recognises: whether a folder looks like one.
        contents: reads the contents of a folder; raises CheckpointError if it cannot.
        stem: name of the weights file for these bits, without the suffixes of shards and indexes.
        describe: writes the description of these tensors: name -> how its linear is quantized, None for a float tensor.
        carried_faults: faults of tensors outside the quantized linears, given as name -> shape.
    """

    recognises: Callable[[Path], bool]
    contents: Callable[[Path], FolderContents]
    stem: Callable[[Iterable[int]], str]
    describe: Callable[[Path, Mapping[str, LinearSpec | None]], None]
    carried_faults: Callable[[Mapping[str, tuple[int, ...]]], list[str]]
