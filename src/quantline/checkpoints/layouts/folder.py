"""Whole checkpoints that their config.json does not describe: what such a folder holds, and how one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.safetensors_file import TensorInfo


@dataclass(frozen=True)
class FolderFault:
    """Why a checkpoint cannot be read: the tensor (or module), the fact, the remedy."""

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
    """What a folder holds, decided from headers and its description.

    Attributes:
        folder: where it is.
        layout: key in `layouts.LAYOUTS` of the folder as a whole.
        variant: how its tool calls the way it was saved.
        description: file name of the description.
        files: tensor name -> file name, all tensors of the folder.
        infos: tensor name -> dtype, shape and place in its file.
        layers: module name -> quantized linear.
        carried: output name -> source tensor, for everything that stays as it is.
        dropped: source tensor -> why it is neither.
        float_linears: modules with a float weight matrix, embeddings left out (by "embed" or "wte" in the name).
        refusals: everything that stands against reading it; only without any may `layers` be used.
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
    """How folders of a layout are recognised, read and described.

    Attributes:
        recognises: whether a folder looks like one.
        contents: what a folder holds; raises CheckpointError where that cannot be told.
        stem: name of the weights of linears of these bits, without what shards and indexes add to it.
        describe: write the description of these tensors: name -> how its linear is quantized, None for a float tensor.
        carried_faults: what cannot stay as it is, by name -> shape of the tensors outside the quantized linears.
    """

    recognises: Callable[[Path], bool]
    contents: Callable[[Path], FolderContents]
    stem: Callable[[Iterable[int]], str]
    describe: Callable[[Path, Mapping[str, LinearSpec | None]], None]
    carried_faults: Callable[[Mapping[str, tuple[int, ...]]], list[str]]
