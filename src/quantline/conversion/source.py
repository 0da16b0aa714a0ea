"""A quantized checkpoint of any known tool as one thing: its linears, what is carried over, and how to read a linear.

Recognised are msModelSlim folders by their description or weights, the others by config.json. What bitsandbytes wrote has
no codes on a grid: its linears are listed and can be kept, not converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of
from quantline.checkpoints.layouts import LAYOUTS, AffineLinear, bitsandbytes
from quantline.checkpoints.layouts.msmodelslim import codec, files
from quantline.checkpoints.layouts.msmodelslim.codec import OutlierReport
from quantline.checkpoints.layouts.registry import MSMODELSLIM
from quantline.checkpoints.quantization_config import QuantizationInfo
from quantline.checkpoints.safetensors_file import to_float32
from quantline.conversion.errors import ConversionError
from quantline.conversion.tensor_reader import TensorFiles
from quantline.core.errors import UserError
from quantline.core.files import read_json

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class SourceLayer:
    """A quantized linear: its settings, its widths, and suffix -> tensor name; the bias is a tensor carried over."""

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    tensors: Mapping[str, str]
    packed: bool = False


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        folder: where it is.
        layout: key of `formats.LAYOUTS`, msmodelslim or bitsandbytes.
        kind: what to call it.
        tensors: how to get at them.
        layers: name -> quantized linear.
        carried: output name -> source name of what stays as it is.
        left_out: source tensor -> why it is neither.
        float_linears: modules with a float weight matrix.
        config: content of config.json without its quantization_config.
        info: what the config says of the quantization; None for msModelSlim.
        faults, warnings: what speaks against it, and what a user should know.
    """

    folder: Path
    layout: str
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
        return "scales" if self.layout.startswith(("awq", "gptq")) else "weight_scale"

    def read(self, layer: SourceLayer, requantize: bool) -> tuple[AffineLinear, OutlierReport | None]:
        """A linear without its bias, and the groups that were quantized again where that is allowed.

        Raises:
            FormatError: its tensors are not what the layout says.
        """
        stored = {suffix: _plain(self.tensors.read(name)) for suffix, name in layer.tensors.items()}
        return self._decode(layer, stored, requantize, layer.group_size, layer.packed)

    def check_codes(self, layer: SourceLayer) -> None:
        """Read the codes once where their bytes could hold more than their bits: 4-bit msModelSlim linears, one a byte.

        A tenth of a second of a processor for a gigabyte, so that codes which are not what the description says are found
        before anything is written.

        Raises:
            FormatError: they are wider than described.
        """
        if self.layout == MSMODELSLIM and layer.bits == 4 and not layer.packed:
            codec.check_range(*self.tensors.extremes(layer.tensors["weight"]))

    def outline(self, layer: SourceLayer, requantize: bool) -> tuple[AffineLinear, int]:
        """Scales and zero points of a linear, as a linear of fewer columns where that is cheaper; and its outliers.

        Raises:
            FormatError: as `read`.
        """
        if self.layout != MSMODELSLIM:
            return self.read(layer, requantize)[0], 0
        # One column a group, of codes 0, has the same scales and offsets as the linear itself.
        partners = {
            suffix: _plain(self.tensors.read(name)) for suffix, name in layer.tensors.items() if suffix != "weight"
        }
        groups = partners["weight_scale"].size // layer.out_features
        stored = {"weight": np.zeros((layer.out_features, groups), dtype=np.int8), **partners}
        linear, report = self._decode(layer, stored, requantize, -1 if layer.group_size == -1 else 1, False)
        return linear, len(report) if report is not None else 0

    def _decode(
        self, layer: SourceLayer, stored: Mapping[str, NDArray[Any]], requantize: bool, group_size: int, packed: bool
    ) -> tuple[AffineLinear, OutlierReport | None]:
        if self.layout != MSMODELSLIM:
            return LAYOUTS[self.layout].read(stored, bits=layer.bits, group_size=group_size), None
        if requantize:
            return codec.read_with_outliers(stored, bits=layer.bits, group_size=group_size, packed=packed)
        return codec.read(stored, bits=layer.bits, group_size=group_size, packed=packed), None

    def order(self) -> list[tuple[str, str | None]]:
        """Output linears (name, None) and carried tensors (name, source name), as they lie in the source's files."""

        def place(name: str) -> tuple[str, int]:
            return self.tensors.files[name], self.tensors.infos[name].offset

        units: list[tuple[tuple[str, int], str, str | None]] = [
            (place(next(iter(layer.tensors.values()))), name, None) for name, layer in self.layers.items()
        ]
        units += [(place(name), output, name) for output, name in self.carried.items()]
        return [(output, name) for _, output, name in sorted(units, key=lambda unit: unit[:2])]


def open_source(folder: Path, kind: str = "auto") -> Source:
    """Recognise and open a checkpoint; `kind` is auto or msmodelslim.

    Raises:
        ConversionError: it is no quantized checkpoint that is known, or its files cannot be read.
    """
    if not folder.is_dir():
        raise ConversionError([f"{folder}: is not a folder; check source.path"])
    config, faults = _config(folder)
    try:
        if kind == MSMODELSLIM or files.recognises(folder):
            return _msmodelslim(folder, config, faults)
        return _described(folder, config, faults)
    except ConversionError:
        raise
    except UserError as error:
        raise ConversionError([*faults, str(error)]) from error


def _config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    if not (folder / "config.json").is_file():
        return {}, [f"{folder.name}/config.json: is missing; copy it from the float model"]
    try:
        return read_json(folder / "config.json"), []
    except UserError as error:
        return {}, [str(error)]


def _msmodelslim(folder: Path, config: dict[str, Any], faults: list[str]) -> Source:
    plan = files.plan(folder)
    layers = {
        name: SourceLayer(
            name, layer.bits, layer.group_size, layer.in_features, layer.out_features, layer.tensors, layer.packed
        )
        for name, layer in plan.layers.items()
    }
    return Source(
        folder=folder, layout=MSMODELSLIM, kind=f"msmodelslim {plan.variant}",
        tensors=TensorFiles(folder, plan.files, plan.infos), layers=layers, carried=plan.carried,
        left_out=dict.fromkeys(plan.dropped, "a copy or a zero bias that anti-outlier m3 adds to norms"),
        float_linears=plan.float_linears, config=_float_config(config), info=None,
        faults=(*faults, *(str(fault) for fault in plan.refusals)),
    )  # fmt: skip


def _described(folder: Path, config: dict[str, Any], faults: list[str]) -> Source:
    if faults and not (folder / "quantize_config.json").exists():
        raise ConversionError([*faults, *_opening_fault(folder)])
    info = quantization_of(folder)
    if info is None:
        raise ConversionError([f"{folder.name}: is not quantized, so there is nothing to convert; quantize it first"])
    checkpoint = Checkpoint.open(folder)
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    found = _bitsandbytes_layers if info.layout == bitsandbytes.NAME else _packed_layers
    layers, taken = found(checkpoint, info, faults)
    carried = {name: name for name in infos if name not in taken}
    floats = tuple(
        name.removesuffix(".weight") for name in carried
        if name.endswith(".weight") and len(infos[name].shape) == 2 and infos[name].dtype in _FLOATS
        and "embed" not in name and not name.endswith("wte.weight")
    )  # fmt: skip
    return Source(
        folder=folder, layout=info.layout, kind=info.layout, tensors=TensorFiles(folder, checkpoint.shards, infos),
        layers=layers, carried=carried, left_out={}, float_linears=floats, config=_float_config(config), info=info,
        faults=tuple(faults),
    )  # fmt: skip


def _bitsandbytes_layers(
    checkpoint: Checkpoint, info: QuantizationInfo, _faults: list[str]
) -> tuple[dict[str, SourceLayer], set[str]]:
    layers = {}
    for layer, suffixes in bitsandbytes.layers(checkpoint.names).items():
        names = {suffix: name for suffix, name in suffixes.items() if suffix != "bias"}
        tensors = {suffix: checkpoint.tensor(name) for suffix, name in names.items()}
        rows, columns = bitsandbytes.shape_of(tensors, info.bits)
        layers[layer] = SourceLayer(layer, info.bits, info.group_size, columns, rows, names)
    return layers, {name for layer in layers.values() for name in layer.tensors.values()}


def _packed_layers(
    checkpoint: Checkpoint, info: QuantizationInfo, faults: list[str]
) -> tuple[dict[str, SourceLayer], set[str]]:
    """The linears in the layouts of `formats.LAYOUTS`, and the tensors that are theirs; what is amiss joins the faults."""
    infos = set(checkpoint.names)
    known = {suffix: needed for suffix, needed in LAYOUTS[info.layout].TENSORS.items() if suffix != "bias"}
    layers: dict[str, SourceLayer] = {}
    taken: set[str] = set()
    marks = set(known) - {"weight"}  # the name of float weights too
    for layer in sorted({name.rpartition(".")[0] for name in infos if name.rpartition(".")[2] in marks}):
        names = {suffix: f"{layer}.{suffix}" for suffix in known if f"{layer}.{suffix}" in infos}
        taken.update(names.values())
        missing = [f"{layer}.{suffix}" for suffix, needed in known.items() if needed and suffix not in names]
        if missing:
            faults.append(f"{layer}: lacks {', '.join(missing)}; fetch or write the checkpoint again")
            continue
        if "weight" not in known and f"{layer}.weight" in infos:
            faults.append(f"{layer}: is there packed and as float weight; remove one of them")
            continue
        settings = info.of(layer)
        if "weight_zero_point" in known and not settings.symmetric and "weight_zero_point" not in names:
            faults.append(
                f"{layer}: lacks {layer}.weight_zero_point, and config.json says symmetric: false; fetch all tensors, or "
                "correct the config where every zero point is the middle one"
            )
            continue
        rows, columns = _widths(checkpoint, info.layout, names, settings.bits)
        layers[layer] = SourceLayer(layer, settings.bits, settings.group_size, rows, columns, names)
    return layers, taken


def _opening_fault(folder: Path) -> list[str]:
    try:
        Checkpoint.open(folder)
    except UserError as error:
        return [str(error)]
    return []


def _float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}


def _widths(checkpoint: Checkpoint, layout: str, names: Mapping[str, str], bits: int) -> tuple[int, int]:
    """In and out of a linear, from headers; packed compressed-tensors states them in a tensor."""
    if layout == "compressed_tensors_int":
        out_features, in_features = (*checkpoint.info(names["weight"]).shape, 0, 0)[:2]
        return in_features, out_features
    if layout == "compressed_tensors":
        out_features, in_features = (int(size) for size in checkpoint.tensor(names["weight_shape"]).reshape(-1)[:2])
        return in_features, out_features
    rows, columns = (*checkpoint.info(names["qweight"]).shape, 0, 0)[:2]
    if layout == "awq_gemm":
        return rows, columns * 8
    return (columns * 8, rows) if layout == "awq_gemv" else (rows * 32 // bits, columns)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 widened, which is exact."""
    return to_float32(array) if array.dtype.itemsize == 2 and array.dtype.name in ("bfloat16", "void16") else array
