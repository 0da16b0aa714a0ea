"""A quantized checkpoint of any known tool: its linears, the tensors that are carried over, and how to read a linear.

A folder with its own description file is recognised by that file, any other by config.json. Linears of a layout that is
read as weights, such as bitsandbytes, are listed and can be kept, but not converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, linears_of, plain, quantization_of
from quantline.checkpoints.layouts import LAYOUTS, AffineLinear, FormatError, Layout
from quantline.checkpoints.layouts.layout import Found, Shape
from quantline.checkpoints.layouts.linear_spec import LayerSettings, LinearSpec
from quantline.checkpoints.layouts.registry import folder_layout
from quantline.checkpoints.model_config import number_fault
from quantline.checkpoints.quantization_config import QuantizationInfo, float_config, has_own_file
from quantline.conversion.errors import ConversionError
from quantline.conversion.tensor_reader import TensorFiles
from quantline.core.errors import UserError
from quantline.core.files import read_json

_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class SourceLayer:
    """A quantized linear: its layout, settings, widths, and suffix -> tensor name. Its bias is carried over."""

    name: str
    layout: Layout
    bits: int
    group_size: int
    in_features: int
    out_features: int
    tensors: Mapping[str, str]

    @property
    def shape(self) -> Shape:
        """(in_features, out_features)."""
        return self.in_features, self.out_features

    @property
    def spec(self) -> LinearSpec:
        """Bits and group size."""
        return LinearSpec(self.bits, self.group_size)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        folder: the checkpoint's folder.
        layout: of the checkpoint as a whole; each linear has its own.
        kind: the name for messages.
        tensors: reads the tensors.
        layers: name -> quantized linear.
        carried: output name -> source name of each unchanged tensor.
        left_out: source tensor -> why it is in neither of these.
        float_linears: modules with a float weight matrix.
        config: content of config.json without its quantization_config.
        info: the quantization as config.json describes it; None if a separate file does.
        faults, warnings: reasons against a conversion, and notes for the user.
    """

    folder: Path
    layout: Layout
    kind: str
    tensors: TensorFiles
    layers: Mapping[str, SourceLayer]
    carried: Mapping[str, str]
    left_out: Mapping[str, str]
    float_linears: tuple[str, ...]
    config: Mapping[str, Any]
    info: QuantizationInfo | None
    faults: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def scale_suffix(self) -> str:
        """Suffix of the scales."""
        return self.layout.scales[0]

    def read(self, layer: SourceLayer, requantize: bool) -> tuple[AffineLinear, Any | None]:
        """A linear without its bias, and a report of the groups that were quantized again, if that is allowed.

        Raises:
            FormatError: its tensors do not have the layout's form.
        """
        affine, stored = layer.layout.affine, self._stored(layer)
        if requantize and affine is not None and affine.mend is not None:
            return affine.mend(stored, bits=layer.bits, group_size=layer.group_size)
        return layer.layout.read(stored, bits=layer.bits, group_size=layer.group_size), None

    def check_weights(self, layer: SourceLayer) -> None:
        """Check that a linear can be dequantized, for layouts that have nothing else to check.

        Raises:
            FormatError: its tensors do not have the layout's form.
        """
        layer.layout.dequantize(self._stored(layer), bits=layer.bits, group_size=layer.group_size)

    def check_codes(self, layer: SourceLayer) -> None:
        """Check that no code has too many bits, in linears whose bytes could hold more: 4 bits with one code per byte.

        This reads the codes once, before anything is written, and takes 0.1 s of CPU time per gigabyte.

        Raises:
            FormatError: they are wider than described.
        """
        check = layer.layout.affine.check_bytes if layer.layout.affine is not None else None
        if check is not None and layer.bits < 8:
            check(*self.tensors.extremes(layer.tensors[layer.layout.codes]), layer.bits)

    def outline(self, layer: SourceLayer, requantize: bool) -> tuple[AffineLinear, int]:
        """A linear for its scales and zero points, with fewer columns if that is cheaper; and the number of its outliers.

        Raises:
            FormatError: as `read`.
        """
        affine = layer.layout.affine
        if affine is None or affine.outline is None:
            return self.read(layer, requantize)[0], 0
        stored = self._stored(layer, without=layer.layout.codes)
        linear, report = affine.outline(stored, out_features=layer.out_features, spec=layer.spec, mend=requantize)
        return linear, len(report) if report is not None else 0

    def _stored(self, layer: SourceLayer, without: str | None = None) -> dict[str, NDArray[Any]]:
        return {suffix: plain(self.tensors.read(name)) for suffix, name in layer.tensors.items() if suffix != without}

    def order(self) -> list[tuple[str, str | None]]:
        """Output linears (name, None) and carried tensors (name, source name), in the order of the source's files."""

        def place(name: str) -> tuple[str, int]:
            return self.tensors.files[name], self.tensors.infos[name].offset

        units: list[tuple[tuple[str, int], str, str | None]] = [
            (place(next(iter(layer.tensors.values()))), name, None) for name, layer in self.layers.items()
        ]
        units += [(place(name), output, name) for output, name in self.carried.items()]
        return [(output, name) for _, output, name in sorted(units, key=lambda unit: unit[:2])]


def open_source(folder: Path, kind: str = "auto") -> Source:
    """Recognise and open a checkpoint; `kind` is auto, or the method of layouts that folders are recognised by.

    Raises:
        ConversionError: it is not a known quantized checkpoint, or its files cannot be read.
    """
    if not folder.is_dir():
        raise ConversionError([f"{folder}: is not a folder; correct source.path"])
    config, faults = _config(folder)
    try:
        layout = folder_layout(folder, kind)
        return _described(folder, config, faults) if layout is None else _own_form(folder, layout, config, faults)
    except ConversionError:
        raise
    except UserError as error:
        raise ConversionError([*faults, str(error)]) from error


def _config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    if not (folder / "config.json").is_file():
        return {}, [f"{folder.name}/config.json: is missing; copy it from the float model"]
    try:
        config = read_json(folder / "config.json")
    except UserError as error:
        return {}, [str(error)]
    fault = number_fault(config)
    return config, [f"{folder.name}: {fault}"] if fault else []


def _own_form(folder: Path, layout: Layout, config: dict[str, Any], faults: list[str]) -> Source:
    """Open a folder that has its own description file."""
    assert layout.folder is not None
    found = layout.folder.contents(folder)
    layers = {
        name: SourceLayer(
            name, LAYOUTS[one.layout], one.bits, one.group_size, one.in_features, one.out_features, one.tensors
        )
        for name, one in found.layers.items()
    }
    return Source(
        folder=folder, layout=LAYOUTS[found.layout], kind=f"{layout.method} {found.variant}",
        tensors=TensorFiles(folder, found.files, found.infos), layers=layers, carried=found.carried,
        left_out=found.dropped, float_linears=found.float_linears, config=float_config(config), info=None,
        faults=(*faults, *(str(fault) for fault in found.refusals)),
    )  # fmt: skip


def _described(folder: Path, config: dict[str, Any], faults: list[str]) -> Source:
    if faults and not has_own_file(folder):
        raise ConversionError([*faults, *_opening_fault(folder)])
    info = quantization_of(folder)
    if info is None:
        raise ConversionError([f"{folder.name}: is not quantized, so there is nothing to convert; quantize it first"])
    checkpoint = Checkpoint.open(folder)
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    layers, taken = _layers(checkpoint, info, faults)
    carried = {name: name for name in infos if name not in taken}
    floats = tuple(
        name.removesuffix(".weight") for name in carried
        if name.endswith(".weight") and len(infos[name].shape) == 2 and infos[name].dtype in _FLOATS
        and "embed" not in name and not name.endswith("wte.weight")
    )  # fmt: skip
    return Source(
        folder=folder, layout=LAYOUTS[info.layout], kind=info.layout, tensors=TensorFiles(folder, checkpoint.shards, infos),
        layers=layers, carried=carried, left_out={}, float_linears=floats, config=float_config(config), info=info,
        faults=tuple(faults),
    )  # fmt: skip


def _layers(
    checkpoint: Checkpoint, info: QuantizationInfo, faults: list[str]
) -> tuple[dict[str, SourceLayer], set[str]]:
    """The quantized linears and the names of their tensors; faults are added to `faults`."""
    layout = LAYOUTS[info.layout]
    layers: dict[str, SourceLayer] = {}
    taken: set[str] = set()
    for layer, found in linears_of(checkpoint, info.layout).items():
        names = {suffix: name for suffix, name in found.tensors.items() if suffix != "bias"}
        taken.update(names.values())
        settings = info.of(layer)
        fault = _fault(layer, layout, found, settings)
        if fault is not None:
            faults.append(f"{layer}: {fault}")
            continue
        stored = {suffix: checkpoint.tensor(name) for suffix, name in names.items()}
        try:
            wide, high = layout.shape(stored, settings.bits)
        except FormatError as error:
            faults.append(f"{layer}: {error}")
            continue
        layers[layer] = SourceLayer(layer, layout, settings.bits, settings.group_size, wide, high, names)
    return layers, taken


def _fault(layer: str, layout: Layout, found: Found, settings: LayerSettings) -> str | None:
    if found.missing:
        missing = ", ".join(f"{layer}.{suffix}" for suffix in found.missing)
        return f"lacks {missing}; fetch or write the checkpoint again"
    if found.also_float:
        return "has both a packed and a float weight; remove one of them"
    absent = [suffix for suffix in layout.zeros if suffix not in found.tensors]
    if absent and not settings.symmetric:
        return (
            f"lacks {layer}.{absent[0]}, but config.json says symmetric: false; fetch all tensors, or correct the config "
            "if every zero point is the middle one"
        )
    return None


def _opening_fault(folder: Path) -> list[str]:
    try:
        Checkpoint.open(folder)
    except UserError as error:
        return [str(error)]
    return []
