"""What a weight layout answers about itself; `registry.LAYOUTS` holds all of them.

Every layout says which tensors it makes of a linear, what it cannot hold, how a config describes it, and which weights its
tensors stand for. Those whose weights are ``(u - z) * s`` also say how to get at codes, scales and zero points (`Affine`);
the others are read as weights, and cannot be converted.
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
    """What decides a linear's tensors beside its shape, bits and groups.

    Attributes:
        scale_dtype: of the scales, where the layout leaves that open.
        zero_points: whether zero points are there, where the layout may leave them out.
        sequential: groups are runs of consecutive input columns.
        double_quant: the scales are quantized again (bitsandbytes at 4 bits).
    """

    scale_dtype: str = "F16"
    zero_points: bool = True
    sequential: bool = True
    double_quant: bool = True


@dataclass(frozen=True)
class Fault:
    """What a layout cannot hold of a linear. about: what it concerns; faults about the same are alike."""

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
    """One linear's tensors, keyed by suffix, as codes, scales and zero points; raises FormatError."""

    def __call__(self, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
        """See the class."""


class ReadGrid(Protocol):
    """All but the codes of a linear of ``shape`` (in, out); raises FormatError."""

    def __call__(self, tensors: Tensors, shape: tuple[int, ...], *, bits: int, group_size: int) -> Grid:
        """See the class."""


class Dequantize(Protocol):
    """The weight float32 (out, in) that one linear's tensors stand for; raises FormatError."""

    def __call__(self, tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
        """See the class."""


class Mend(Protocol):
    """As `Read`, with the groups quantized again that have no exact zero point; the report has one record each."""

    def __call__(self, tensors: Tensors, *, bits: int, group_size: int) -> tuple[AffineLinear, Any]:
        """See the class."""


@dataclass(frozen=True)
class Bands:
    """How a compiled kernel writes a layout: kernel is the way that codes are packed (see conversion/kernels.py)."""

    kernel: Literal["along", "across", "flat"]
    read_grid: ReadGrid
    write_grid: Callable[..., dict[str, NDArray[Any]]]


class Outline(Protocol):
    """Scales and zero points from all tensors but the codes, as a linear of one column a group; raises FormatError.

    mend: as `Mend`; the report is None without it.
    """

    def __call__(
        self, partners: Tensors, *, out_features: int, spec: LinearSpec, mend: bool
    ) -> tuple[AffineLinear, Any]:
        """See the class."""


@dataclass(frozen=True)
class Affine:
    """Of layouts whose weights are ``(u - z) * s``.

    Attributes:
        read: as `Layout.read`.
        write: as `Layout.write`; takes `zero_points` if they are optional.
        rows_are_outputs: codes are stored (out, in).
        optional_zeros: zero points are left out where all of them are the middle one.
        half_scales: readers keep scales in float16. Where they are wider, converting rounds them.
        casts_at_loading: readers round scales to the dtype that they compute in.
        mend: for layouts that can hold groups without an exact zero point.
        outline: where scales and zero points can be had without reading the codes.
        check_bytes: for layouts of one signed code a byte, output rows first, which kernels read as they lie in the file:
            raise FormatError unless bytes from the least to the largest are codes of so many bits.
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
    """How the `quantization_config` of config.json describes a layout.

    Attributes:
        describe: the section; raises CheckpointError where it has no way to say this.
        parse: what a section of the layout's method says; raises CheckpointError.
        own_file: readers also look for the section in a file of this name.
        names_tied_head: modules are named by their class, so that an output layer that is tied to the embeddings, and has
            no tensor, has to be named where it stays in float.
    """

    describe: Callable[[Description], dict[str, Any]]
    parse: Callable[[Path, Mapping[str, Any]], QuantizationInfo]
    own_file: str | None = None
    names_tied_head: bool = False


def _itself(_bits: Collection[int], _symmetric: bool) -> str | None:
    return None


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """A weight layout; all of it is pure, and inputs stay unchanged.

    Attributes:
        name: its key in `LAYOUTS`.
        method: `quant_method` in config.json; layouts of one method are read by the same libraries.
        tensors: tensor suffix -> whether a linear must have it.
        scales, zeros, codes: which of them are what.
        specs: dtype and shape of every tensor of a linear, by suffix; the bias, which is carried, is left out.
        shape: (in_features, out_features) from a linear's tensors and bits; looks at as few of their bytes as it can.
        faults: what it cannot hold of one linear.
        dequantize: the weights.
        affine: None for layouts that are read as weights.
        config: None for layouts that config.json does not describe; those have a `folder`.
        folder: None for layouts that config.json describes.
        finder: finds the quantized linears among tensor names -> dtypes, where suffixes alone do not tell.
        mixed: linears of one checkpoint may differ in bits and group size.
        mixed_target: a conversion may write such a checkpoint.
        desc_act: with the option of this name, its quantizers leave groups reordered by activation.
        activations: its runtimes also round what goes into the linears.
        target: its name as `convert.target`; None where nothing is converted to it.
        servable: a server reads it as it is.
        nearest: the layout that `convert.target=auto` makes of it, from the bits of its linears and whether they are
            symmetric; None is itself.
        zero_hazard: what is known against zero points of 0.
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
    nearest: Callable[[Collection[int], bool], str | None] = _itself
    zero_hazard: str = ""

    def __repr__(self) -> str:
        return f"<layout {self.name}>"

    def read(self, tensors: Tensors, *, bits: int, group_size: int) -> AffineLinear:
        """One linear's tensors, keyed by suffix, as codes, scales and zero points.

        Raises:
            FormatError: they are not what the layout says, or the layout has none.
        """
        return self._affine().read(tensors, bits=bits, group_size=group_size)

    def write(self, linear: AffineLinear, *, zero_points: bool | None = None) -> dict[str, NDArray[Any]]:
        """A linear's tensors, keyed by suffix.

        zero_points: whether they are written, where the layout can leave them out; None decides by this linear alone.

        Raises:
            FormatError: the layout cannot hold it.
        """
        own = self._affine()
        return own.write(linear, zero_points=zero_points) if own.optional_zeros else own.write(linear)

    def _affine(self) -> Affine:
        if self.affine is None:
            raise FormatError(f"{self.name}: its weights have no codes on a grid with scales and zero points")
        return self.affine

    def bytes_of(self, shape: Shape, spec: LinearSpec, storage: Storage) -> LinearBytes:
        """What the tensors of one linear take; what has no fixed size is left out."""
        found = {suffix: one.nbytes for suffix, one in self.specs(shape, spec, storage).items()}
        codes = found.pop(self.codes)
        scales, zeros = (sum(found.pop(suffix, 0) for suffix in group) for group in (self.scales, self.zeros))
        return LinearBytes(codes, scales, zeros, sum(found.values()))

    def linears(self, dtypes: Mapping[str, str]) -> dict[str, Found]:
        """The quantized linears among tensor names -> dtypes, complete or not."""
        return self.finder(dtypes) if self.finder is not None else _find(self.tensors, dtypes)

    @property
    def telling(self) -> tuple[str, ...]:
        """Suffixes that no float linear has."""
        return self.marks or tuple(suffix for suffix in self.tensors if suffix not in ("weight", "bias"))


def _find(known: Mapping[str, bool], dtypes: Mapping[str, str]) -> dict[str, Found]:
    """By suffixes; where codes have the float weight's name, only their dtype tells a linear without partners."""
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
    """How an affine layout dequantizes: in float32, ``(u - z) * s``."""

    def dequantize(tensors: Tensors, *, bits: int, group_size: int) -> NDArray[np.float32]:
        weights: NDArray[np.float32] = dequantize_affine(read(tensors, bits=bits, group_size=group_size))
        return weights

    return dequantize


def groups_of(shape: Shape, spec: LinearSpec) -> int:
    """Groups along the input."""
    return 1 if spec.group_size == -1 else -(-shape[0] // spec.group_size)


def word_faults(layout: str, shape: Shape, multiple: int) -> list[Fault]:
    """Widths that do not fill whole words."""
    return [
        Fault(
            "width",
            f"{name}={width} does not fill whole words of {layout}, a multiple of {multiple} does",
            "use compressed_tensors, or leave it in float",
        )
        for name, width in zip(("in_features", "out_features"), shape, strict=True)
        if width % multiple
    ]


def bits_faults(title: str, held: Collection[int], spec: LinearSpec) -> list[Fault]:
    """Bits that are not held."""
    if spec.bits in held:
        return []
    known = " and ".join(map(str, held))
    return [Fault("bits", f"has {spec.bits} bits, {title} holds {known}", "use gptq or compressed_tensors")]


def order_faults(title: str, storage: Storage, remedy: str) -> list[Fault]:
    """Reordered groups, for layouts that cannot hold them."""
    if storage.sequential:
        return []
    return [Fault("order", f"groups are reordered by activation (desc_act), which {title} cannot hold", remedy)]


def sizes_of(array: NDArray[Any]) -> Shape:
    """Both sizes of a matrix, from its header alone; 0 for what is missing, which reading refuses."""
    first, second = (*array.shape, 0, 0)[:2]
    return int(first), int(second)
