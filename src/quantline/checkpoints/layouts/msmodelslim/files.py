"""msModelSlim checkpoints as folders: finds their layers from headers, and writes them.

| save mode | description | weights |
| --- | --- | --- |
| safe_tensor (v0) | quant_model_description_w4a16.json | quant_model_weight_w4a16.safetensors |
| ascendV1 (v0) | quant_model_description.json, with ``version`` | quant_model_weight_w4a16.safetensors |
| v1 saver | quant_model_description.json, with ``version`` | quant_model_weights.safetensors |

Weights may be sharded (``<stem>-0000i-of-0000N.safetensors`` and ``<stem>.safetensors.index.json``). The description is
one flat JSON object: tensor name -> scheme ("W4A16", "W8A16", "FLOAT", others), with keys about the whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantline.checkpoints.layouts.affine import AffineLinear
from quantline.checkpoints.layouts.folder import FolderContents
from quantline.checkpoints.layouts.msmodelslim import codec
from quantline.checkpoints.layouts.msmodelslim.tensors import (
    ASCEND_V1,
    FLOAT,
    SAFE_TENSOR,
    SUFFIXES,
    V1,
    Planner,
)
from quantline.checkpoints.safetensors_file import read_header, read_index, write_safetensors
from quantline.core.errors import CheckpointError
from quantline.core.files import read_json

__all__ = [
    "ASCEND_V1", "FLOAT", "SAFE_TENSOR", "V1", "plan", "recognises", "scheme_of", "stem_of",
    "write_description", "write_files",
]  # fmt: skip

_INDEX = ".index.json"
_WEIGHTS = re.compile(r"quant_model_weights?(_[A-Za-z0-9_]+)?\.safetensors(\.index\.json)?")
_DESCRIPTION = "quant_model_description*.json"


def recognises(folder: str | Path) -> bool:
    """Whether a folder looks like a msModelSlim checkpoint: it has a description or weights of that name."""
    return any(Path(folder).glob(_DESCRIPTION)) or bool(_weights_in(Path(folder)))


def plan(folder: str | Path) -> FolderContents:
    """Read description and headers and decide about every tensor.

    Raises:
        CheckpointError: there is not exactly one description and one set of weights, JSON or a header is damaged, or
            the index names files outside the folder. Faults of single tensors are in `FolderContents.refusals`.
    """
    folder = Path(folder)
    description, weights = _find(folder)
    schemes = _schemes(folder / description)
    if weights.endswith(_INDEX):
        files, infos = read_index(folder / weights)
    else:
        infos = read_header(folder / weights)
        files = dict.fromkeys(sorted(infos), weights)
    variant = V1 if weights.startswith("quant_model_weights") else ASCEND_V1 if "version" in schemes else SAFE_TENSOR
    return Planner(folder, variant, description, files, infos, schemes).plan()


def _schemes(path: Path) -> dict[str, Any]:
    """The content of a description; what tensors and the whole model have is a scheme's name. Keys of tensors have a dot."""
    content = read_json(path)
    for key, value in content.items():
        tensor = "." in key and (key.rpartition(".")[2] in SUFFIXES or isinstance(value, (dict, list)))
        if not isinstance(value, str) and (tensor or key == "model_quant_type"):
            raise CheckpointError(f"{path}: {key} is {value!r}: it must be a scheme such as W8A16 or FLOAT; correct it")
    return content


def _weights_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("quant_model_weight*") if _WEIGHTS.fullmatch(path.name))


def _find(folder: Path) -> tuple[str, str]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder: check the path")
    found = {
        "description (quant_model_description*.json)": sorted(path.name for path in folder.glob(_DESCRIPTION)),
        "weights file (quant_model_weight*.safetensors or its index)": _weights_in(folder),
    }
    for what, names in found.items():
        if not names:
            raise CheckpointError(f"{folder}: has no msModelSlim {what}: fetch it, or check the path")
        if len(names) > 1:
            raise CheckpointError(f"{folder}: has more than one {what}, {', '.join(names)}: keep only one")
    description, weights = (names[0] for names in found.values())
    return description, weights


def stem_of(bits: Iterable[int], variant: str) -> str:
    """Name of the weights file for these bits, without `.safetensors` and the suffixes of shards."""
    return "quant_model_weights" if variant == V1 else f"quant_model_weight_{_whole(bits).lower()}"


def write_description(
    folder: Path, schemes: Mapping[str, Any], bits: Iterable[int], group_size: int, variant: str
) -> None:
    """Write the description.

    Args:
        folder: to write to.
        schemes: tensor name -> "W4A16", "W8A16" or "FLOAT".
        bits: of the quantized linears; the model is described by the smallest.
        group_size: the largest of the linears, -1 where all are per channel.
        variant: "safe_tensor", "ascendV1" or "v1".
    """
    whole = _whole(bits)
    head: dict[str, Any] = {"model_quant_type": whole}
    if variant != SAFE_TENSOR:
        head["version"] = "1.0.0"
        if group_size > 0 or variant == V1:
            head["group_size"] = max(group_size, 0)
    if variant == V1:
        head |= {"metadata": {}, "optional": {}}
    kind = "" if variant != SAFE_TENSOR else f"_{whole.lower()}"
    description = folder / f"quant_model_description{kind}.json"
    description.write_text(json.dumps({**head, **schemes}, indent=2) + "\n", encoding="utf-8")


def scheme_of(bits: int) -> str:
    """The scheme of linears of these bits in the description."""
    return f"W{bits}A16"


def _whole(bits: Iterable[int]) -> str:
    return scheme_of(min(bits, default=8))


def write_files(
    folder: str | Path,
    linears: Mapping[str, AffineLinear],
    tensors: Mapping[str, NDArray[Any]],
    *,
    variant: str = SAFE_TENSOR,
    shards: int = 1,
) -> None:
    """Write description and weights to an existing folder; config and tokenizer are the caller's.

    Args:
        folder: to write to.
        linears: module name -> layer; 4-bit ones are packed under "ascendV1".
        tensors: name -> float tensor, described as FLOAT.
        variant: "safe_tensor", "ascendV1" or "v1".
        shards: number of weights files; v0 writes an index for 2 or more, v1 always.

    Raises:
        FormatError: the layout cannot store a layer.
        CheckpointError: the variant is unknown, or a tensor is given twice.
    """
    folder = Path(folder)
    if variant not in (SAFE_TENSOR, ASCEND_V1, V1):
        raise CheckpointError(f"variant={variant!r}: supported are {SAFE_TENSOR}, {ASCEND_V1} and {V1}")
    stored: dict[str, NDArray[Any]] = dict(tensors)
    schemes: dict[str, Any] = dict.fromkeys(tensors, FLOAT)
    for name, linear in linears.items():
        written = codec.write(linear, packed=variant == ASCEND_V1 and linear.bits == 4)
        for suffix, array in written.items():
            if f"{name}.{suffix}" in stored:
                raise CheckpointError(f"{name}.{suffix}: given twice; leave it out of the float tensors")
            stored[f"{name}.{suffix}"] = array
            schemes[f"{name}.{suffix}"] = FLOAT if suffix == "bias" else scheme_of(linear.bits)
    size = max((linear.group_size for linear in linears.values()), default=-1)
    widths = [linear.bits for linear in linears.values()]
    write_description(folder, schemes, widths, size, variant)
    stem = stem_of(widths, variant)
    if shards == 1 and variant != V1:
        write_safetensors(folder / f"{stem}.safetensors", stored)
        return
    names = sorted(stored)
    weight_map: dict[str, str] = {}
    for part in range(shards):
        file = f"{stem}-{part + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[part * len(names) // shards : (part + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: stored[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    content = {"metadata": {"total_size": sum(array.nbytes for array in stored.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
