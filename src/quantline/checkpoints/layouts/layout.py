"""The description of a weight layout; `registry.LAYOUTS` lists all of them.

Every layout defines the tensors of a linear, what it cannot store, its section in config.json, and how to dequantize.
Layouts whose weights are ``(u - z) * s`` also give codes, scales and zero points (`Affine`). The others are read as weights,
and cannot be converted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.affine import AffineLinear, Grid
from quantline.checkpoints.layouts.affine import dequantize as dequantize_affine
from quantline.checkpoints.layouts.checks import Tensors
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.folder import FolderForm
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.sizes import LinearBytes
from quantline.checkpoints.safetensors_stream import TensorSpec

Shape = tuple[int, int]  # (in_features, out_features)


@dataclass(frozen=True)
class Storage:
    """Properties that determine a linear's tensors, besides its shape, bits and groups.

    Attributes:
        scale_dtype: dtype of the scales, where the layout allows several.
        zero_points: whether zero points are stored, where the layout may omit them.
        sequential: groups are runs of consecutive input columns.
        double_quant: the scales are quantized again (bitsandbytes at 4 bits).
    """

    scale_dtype: str = "F16"
    zero_points: bool = True
    sequential: bool = True
    double_quant: bool = True


@dataclass(frozen=True)
class Fault:
    """Why a layout cannot store a linear. about: the property at fault, by which faults are grouped."""

    about: Literal["bits", "groups", "order", "width"]
    fact: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fact}; {self.remedy}"


@dataclass(frozen=True)
class Found:
    """A linear whose tensors were found by their names: suffix -> tensor name, and the suffixes that are missing."""

    tensors: Mapping[str, str]
    missing: tuple[str, ...] = ()
    also_float: bool = False


class Read(Protocol):
    """Reads a linear's tensors, keyed by suffix, as codes, scales and zero points; raises FormatError."""

    def __call__(self, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
        """See the class."""


class ReadGrid(Protocol):
    """Reads everything but the codes of a linear of ``shape`` (in, out); raises FormatError."""

    def __call__(self, tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int) -> Grid:
        """See the class."""


class Dequantize(Protocol):
    """Dequantizes a linear's tensors to its weight, float32 (out, in); raises FormatError."""

    def __call__(self, tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
        """See the class."""


class Mend(Protocol):
    """As `Read`, but requantizes groups without an exact zero point; the report has one record for each."""

    def __call__(self, tensors: Tensors, *, bits: int, group_size: int) -> tuple[AffineLinear, Any]:
        """See the class."""


@dataclass(frozen=True)
class Bands:
    """How a compiled kernel writes a layout; `kernel` names the packing of codes (see conversion/kernels.py)."""

    kernel: Literal["along", "across", "flat"]
    read_grid: ReadGrid
    write_grid: Callable[..., dict[str, NDArray[Any]]]


class Outline(Protocol):
    """Reads all tensors but the codes, as a linear with one column per group; raises FormatError.

    mend: as `Mend`; the report is None without it.
    """

    def __call__(
        self, partners: Tensors, *, out_features: int, spec: LinearSpec, mend: bool
    ) -> tuple[AffineLinear, Any]:
        """See the class."""


@dataclass(frozen=True)
class Affine:
    """Properties of a layout whose weights are ``(u - z) * s``.

    Attributes:
        read: as `Layout.read`.
        write: as `Layout.write`; takes `zero_points` if these are optional.
        rows_are_outputs: codes are stored (out, in).
        optional_zeros: zero points are omitted if all of them are the middle one.
        half_scales: readers keep scales in float16. A conversion rounds wider ones.
        casts_at_loading: readers round scales to their compute dtype.
        mend: for layouts that can hold groups without an exact zero point.
        outline: for layouts whose scales and zero points can be read without the codes.
        check_bytes: for layouts of one signed code per byte, output rows first, which kernels read directly from the file.
            Called with the smallest and the largest byte and the bits; raises FormatError unless these are codes.
        bands: for layouts that kernels write.
    """

    read: Read
    write: Callable[..., dict[str, NDArray[Any]]]
    rows_are_outputs: bool = False
    optional_zeros: bool = False
    half_scales: bool = False
    casts_at_loading: bool = False
    mend: Mend | None = None
    outline: Outline | None = None
    check_bytes: Callable[[int, int, int], None] | None = None
    bands: Bands | None = None


@dataclass(frozen=True)
class ConfigSection:
    """A layout's section `quantization_config` in config.json.

    Attributes:
        describe: writes the section; raises CheckpointError if the section cannot express the description.
        parse: reads a section of the layout's method; raises CheckpointError.
        own_file: readers also look for the section in a file of this name, so it is written too.
        old_file: an old tool wrote the section to a file of this name alone.
        names_tied_head: the section names modules by class. An output layer that is tied to the embeddings has no tensor,
            but must be named if it stays in float.
    """

    describe: Callable[[Description], dict[str, Any]]
    parse: Callable[[Path, Mapping[str, Any]], QuantizationInfo]
    own_file: str | None = None
    old_file: str | None = None
    names_tied_head: bool = False


def _itself(_specs: Collection[LinearSpec], _symmetric: bool, _reordered: bool) -> str | None:
    return None


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """A weight layout. Its functions are pure and do not modify their inputs.

    Attributes:
        name: its key in `LAYOUTS`.
        method: `quant_method` in config.json; the same libraries read all layouts of a method.
        tensors: tensor suffix -> whether a linear must have it.
        scales, zeros, codes: their suffixes; no suffix of codes where one tensor holds codes and scales.
        specs: dtype and shape of every tensor of a linear, by suffix, except for the bias, which is not converted.
        shape: (in_features, out_features) from a linear's tensors and bits; reads as few of their bytes as possible.
        faults: why it cannot store a linear.
        dequantize: gives the weights.
        affine: None for layouts that are read as weights.
        config: None for layouts without a section in config.json; those have a `folder`.
        folder: None for layouts with a section in config.json.
        finder: finds the quantized linears among tensor names -> dtypes, where suffixes are not enough.
        mixed: linears of one checkpoint may differ in bits and group size.
        mixed_target: a conversion may write such a checkpoint.
        desc_act: its quantizers reorder groups by activation if the option of this name is set.
        activations: its runtimes also quantize the inputs of linears.
        target: its name as `convert.target`; None if it is not a target.
        servable: a server can read it.
        nearest: the layout that `convert.target=auto` converts it to, given bits and groups of its linears, whether they are
            symmetric, and whether groups are reordered; None keeps it.
        zero_hazard: a known problem with zero points of 0.
        whole: its writers quantize the embeddings and the output layer, too, and decide about all types themselves.
        own_head: its writers store an output layer of its own, also where config.json ties it to the embeddings.
        runtime: the server that reads it.
    """

    name: str
    method: str
    tensors: Mapping[str, bool]
    codes: str
    scales: tuple[str, ...]
    specs: Callable[[Shape, LinearSpec, Storage], dict[str, TensorSpec]]
    shape: Callable[[Tensors, int], Shape]
    faults: Callable[[Shape, LinearSpec, Storage], list[Fault]]
    dequantize: Dequantize
    zeros: tuple[str, ...] = ()
    affine: Affine | None = None
    config: ConfigSection | None = None
    folder: FolderForm | None = None
    finder: Callable[[Mapping[str, str]], dict[str, Found]] | None = None
    marks: tuple[str, ...] = field(default=())
    mixed: bool = False
    mixed_target: bool = False
    desc_act: bool = False
    activations: bool = False
    target: str | None = None
    servable: bool = True
    nearest: Callable[[Collection[LinearSpec], bool, bool], str | None] = _itself
    zero_hazard: str = ""
    whole: bool = False
    own_head: bool = False
    runtime: str = "vllm"

    def __repr__(self) -> str:
        return f"<layout {self.name}>"

    def read(self, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
        """One linear's tensors, keyed by suffix, as codes, scales and zero points.

        Raises:
            FormatError: they do not fit the layout, or the layout has no codes, scales and zero points.
        """
        return self._affine().read(tensors, bits=bits, group_size=group_size)

    def write(self, linear: AffineLinear, *, zero_points: bool | None = None) -> dict[str, NDArray[Any]]:
        """A linear's tensors, keyed by suffix.

        zero_points: whether to write them, where the layout may omit them; None decides by this linear alone.

        Raises:
            FormatError: the layout cannot store it.
        """
        affine = self._affine()
        return affine.write(linear, zero_points=zero_points) if affine.optional_zeros else affine.write(linear)

    def _affine(self) -> Affine:
        if self.affine is None:
            raise FormatError(f"{self.name}: its weights have no codes on a grid with scales and zero points")
        return self.affine

    def bytes_of(self, shape: Shape, spec: LinearSpec, storage: Storage) -> LinearBytes:
        """Bytes of a linear's tensors, except for those of variable size."""
        sizes = {suffix: one.nbytes for suffix, one in self.specs(shape, spec, storage).items()}
        if not self.codes:
            return LinearBytes(sum(sizes.values()))
        codes = sizes.pop(self.codes)
        scales, zeros = (sum(sizes.pop(suffix, 0) for suffix in group) for group in (self.scales, self.zeros))
        return LinearBytes(codes, scales, zeros, sum(sizes.values()))

    def linears(self, dtypes: Mapping[str, str]) -> dict[str, Found]:
        """The quantized linears among tensor names -> dtypes, complete or not."""
        return self.finder(dtypes) if self.finder is not None else _find(self.tensors, dtypes)

    @property
    def telling(self) -> tuple[str, ...]:
        """Suffixes that no float linear has."""
        return self.marks or tuple(suffix for suffix in self.tensors if suffix not in ("weight", "bias"))


def _find(known: Mapping[str, bool], dtypes: Mapping[str, str]) -> dict[str, Found]:
    """Find linears by suffix. Codes named `weight` are distinguished from float weights by their dtype."""
    telling = {suffix for suffix in known if suffix not in ("weight", "bias")}
    layers = {layer for layer, _, suffix in (name.rpartition(".") for name in dtypes) if suffix in telling}
    if "weight" in known:
        layers |= {
            name.removesuffix(".weight") for name, dtype in dtypes.items() if name.endswith(".weight") and dtype == "I8"
        }
    return {
        layer: Found(
            {suffix: f"{layer}.{suffix}" for suffix in known if f"{layer}.{suffix}" in dtypes},
            tuple(suffix for suffix, needed in known.items() if needed and f"{layer}.{suffix}" not in dtypes),
            "weight" not in known and f"{layer}.weight" in dtypes,
        )
        for layer in sorted(layers)
    }


def weights_of(read: Read) -> Dequantize:
    """The `dequantize` of an affine layout: ``(u - z) * s`` in float32."""

    def dequantize(tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
        weights: NDArray[np.float32] = dequantize_affine(read(tensors, bits=bits, group_size=group_size))
        return weights

    return dequantize


def groups_of(shape: Shape, spec: LinearSpec) -> int:
    """Number of groups along the input."""
    return 1 if spec.group_size == -1 else -(-shape[0] // spec.group_size)


def word_faults(layout: str, shape: Shape, multiple: int) -> list[Fault]:
    """Faults of widths that do not fill whole words."""
    return [
        Fault(
            "width",
            f"{name}={width} does not fill whole words of {layout}, which needs a multiple of {multiple}",
            "use compressed_tensors, or leave it in float",
        )
        for name, width in zip(("in_features", "out_features"), shape, strict=True)
        if width % multiple
    ]


def bits_faults(title: str, held: Collection[int], spec: LinearSpec) -> list[Fault]:
    """The fault of bits that the layout does not support."""
    if spec.bits in held:
        return []
    known = " and ".join(map(str, held))
    return [Fault("bits", f"has {spec.bits} bits, but {title} supports {known}", "use gptq or compressed_tensors")]


def order_faults(title: str, storage: Storage, remedy: str) -> list[Fault]:
    """The fault of reordered groups, for layouts that cannot store them."""
    if storage.sequential:
        return []
    return [Fault("order", f"groups are reordered by activation (desc_act), which {title} cannot store", remedy)]


def sizes_of(array: NDArray[Any]) -> Shape:
    """Both sizes of a matrix, from its header; 0 for a missing one, which reading refuses."""
    first, second = (*array.shape, 0, 0)[:2]
    return int(first), int(second)
