"""Bring a quantized checkpoint into the layout that its serving target reads, and prove that nothing changed.

Where the layout serves as it is, the files are carried over. Otherwise each quantized linear is read into the middle form,
written in the target's layout and read back: codes, zero points and scales must be equal. Shards are written one by one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoint import Checkpoint, QuantizationInfo, quantization_of, quantized_layers, write_safetensors
from quantline.errors import UserError
from quantline.formats import LAYOUTS, QuantizedLinear
from quantline.formats.container import read_json
from quantline.jobs import write_json
from quantline.progress import bar

# convert.target -> layout
TARGETS = {"awq": "awq_gemm", "gptq": "gptq", "gptq_v2": "gptq_v2"}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did: layouts, how many linears were rewritten and how many tensors carried over unchanged."""

    source: str
    target: str
    linears: int
    carried: int


def choose_layout(target: str, info: QuantizationInfo, symmetric: bool) -> str:
    """The layout to write. `auto` keeps what vLLM reads and brings the rest to its nearest kin that vLLM does read."""
    if target == "keep":
        return info.layout
    if target != "auto":
        return TARGETS[target]
    if info.layout == "awq_gemv":
        return "awq_gemm"
    # Some readers do not mask the v1 field of a zero point 0, so only symmetric checkpoints go back to v1.
    return "gptq" if info.layout == "gptq_v2" and symmetric else info.layout


def convert(source: Path, out: Path, target: str) -> ConversionReport:
    """Write the checkpoint in `source` to the empty folder `out`, in the target's layout.

    Raises:
        UserError: the source is not quantized, or the target cannot hold it.
        FormatError: a layer does not fit the target's layout.
    """
    info = quantization_of(source)
    if info is None:
        raise UserError(f"{source} is not quantized, so there is nothing to convert; quantize it first")
    layout = choose_layout(target, info, info.symmetric)
    checkpoint = Checkpoint.open(source)
    layers = quantized_layers(checkpoint, info)
    rewritten = layout != info.layout
    for path in sorted(source.iterdir()):
        if path.is_file() and not (rewritten and (path.suffix == ".safetensors" or path.name == _INDEX)):
            _carry(path, out / path.name)
    if rewritten:
        if LAYOUTS[layout].NAME.split("_")[0] != info.method:
            _check_kin(info, layout)
        _rewrite(checkpoint, layers, info, layout, out)
        _describe(out, info, layout)
    quantized = {name for suffixes in layers.values() for name in suffixes.values()}
    return ConversionReport(info.layout, layout, len(layers), len(set(checkpoint.names) - quantized))


def _carry(source: Path, target: Path) -> None:
    # Files of a finished stage are never written in place, so a second name for the same bytes is safe.
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _check_kin(info: QuantizationInfo, layout: str) -> None:
    raise UserError(
        f"convert.target: a {info.layout} checkpoint is not brought to {layout}; "
        f"allowed are keep and {', '.join(key for key, name in TARGETS.items() if name.startswith(info.method))}"
    )


def _rewrite(
    checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, str]], info: QuantizationInfo, layout: str, out: Path
) -> None:
    shards = sorted(set(checkpoint.shards.values()))
    # A layer goes to the shard of its codes, wherever its other tensors were.
    home = {layer: checkpoint.shards[suffixes["qweight"]] for layer, suffixes in layers.items()}
    taken = {name for suffixes in layers.values() for name in suffixes.values()}
    weight_map: dict[str, str] = {}
    done = 0
    with bar(f"convert to {layout}") as progress:
        for shard in shards:
            tensors: dict[str, NDArray[Any]] = {
                name: checkpoint.tensor(name)
                for name in checkpoint.names
                if checkpoint.shards[name] == shard and name not in taken
            }
            for layer in (name for name, place in home.items() if place == shard):
                stored = {suffix: checkpoint.tensor(name) for suffix, name in layers[layer].items()}
                written = convert_layer(layer, stored, info, layout)
                tensors.update({f"{layer}.{suffix}": value for suffix, value in written.items()})
                done += 1
                progress.update(done, len(layers), layer)
            write_safetensors(out / shard, tensors)
            weight_map.update(dict.fromkeys(tensors, shard))
    if len(shards) > 1:
        size = sum((out / shard).stat().st_size for shard in shards)
        write_json(out / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def convert_layer(
    name: str, stored: Mapping[str, NDArray[Any]], info: QuantizationInfo, layout: str
) -> dict[str, NDArray[Any]]:
    """One layer in another layout, read back and compared before it is returned.

    Raises:
        UserError: the layer read back differs from the one that was written.
        FormatError: the layout cannot hold the layer.
    """
    linear = LAYOUTS[info.layout].read(stored, bits=info.bits, group_size=info.group_size)
    written = LAYOUTS[layout].write(linear)
    again = LAYOUTS[layout].read(written, bits=info.bits, group_size=info.group_size)
    if not same_layer(linear, again):
        raise UserError(
            f"{name}: reading the {layout} tensors back gives another layer; keep the source and report this"
        )
    return written


def same_layer(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    """Whether two layers have equal codes, zero points, scales, group index and bias."""
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [
        (one.codes, other.codes),
        (one.zeros, other.zeros),
        (one.scales, other.scales),
    ]
    pairs.append((one.group_index, other.group_index))
    if (one.bias is None) != (other.bias is None):
        return False
    if one.bias is not None and other.bias is not None:
        pairs.append((one.bias, other.bias))
    return all(np.array_equal(left, right) for left, right in pairs)


def _describe(out: Path, info: QuantizationInfo, layout: str) -> None:
    for name in ("config.json", "quantize_config.json"):
        path = out / name
        if not path.exists():
            continue
        content = read_json(path)
        settings = content["quantization_config"] if name == "config.json" else content
        if info.method == "gptq":
            settings["checkpoint_format"] = layout
        else:
            settings["version"] = layout.removeprefix("awq_")
        path.unlink()  # it may be a second name of the source's file
        write_json(path, content)
