"""What every quantizer's result looks like on disk, whichever library computed it. NumPy only.

A result is a whole model folder: weights in the layouts of `checkpoints.layouts`, everything that is not quantized in
float16 (what AutoAWQ and AutoGPTQ save, and what their kernels take), the source's own config.json with a
`quantization_config`, and its tokenizer and generation files byte for byte. Equal jobs give equal bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import (
    Checkpoint,
    iter_dequantized,
    quantized_layers,
    to_float32,
    write_safetensors,
)
from quantline.checkpoints.companions import COMPANIONS
from quantline.checkpoints.layouts import LAYOUTS, AffineLinear, Storage
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import LM_HEAD
from quantline.checkpoints.model_config import read_config, restore_config, write_config
from quantline.checkpoints.quantization_config import LayerSettings, describe, own_file, quantization_of
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError

SHARD_BYTES = 4_000_000_000


Named = tuple[str, NDArray[Any]]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn errors that a user can mend into refusals, which cross the process border as a message."""
    try:
        yield
    except UserError as error:
        raise JobError(str(error)) from error


def float_config(model_dir: str | Path) -> dict[str, Any]:
    """The config.json of a float model.

    Raises:
        JobError: there is none, or the model is quantized already.
    """
    with refusals():
        config = read_config(model_dir)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise JobError(f"{model_dir} is quantized already ({method}): give the float model it was made from")
    return config


def method_options(job: Mapping[str, Any], defaults: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The job's options over the defaults.

    Raises:
        JobError: an option that the method does not have.
    """
    given = dict(job.get("options") or {})
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise JobError(f"options {', '.join(unknown)}: {method} has {', '.join(sorted(defaults))}; remove the others")
    return {**defaults, **given}


def check_shapes(widths: Mapping[str, tuple[int, int]], layout: str, bits: int, group_size: int) -> None:
    """Refuse before any compute what the layout cannot hold.

    Args:
        widths: linear layer -> (in_features, out_features).

    Raises:
        JobError: no layer at all, or the layers that do not fit, all of them.
    """
    if not widths:
        raise JobError(
            "no linear layer was found inside the decoder layers: nothing would be quantized; check the model"
        )
    faults = []
    for name, (in_features, out_features) in widths.items():
        if group_size != -1 and in_features % group_size:
            faults.append(f"{name}: group_size={group_size} does not divide its input width {in_features}")
            continue
        found = LAYOUTS[layout].faults((in_features, out_features), LinearSpec(bits, group_size), Storage())
        faults += [f"{name}: {fault.fact}" for fault in found]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise JobError(
            f"{len(faults)} of {len(widths)} linear layers cannot be quantized:\n{listed}\n"
            "choose a group_size that divides every width, or -1 where the method allows one group per channel"
        )


def half(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Floating values as float16; integers and booleans as they are.

    Raises:
        JobError: a value is not finite, or leaves the range of float16 (65504): bfloat16 models can hold those.
    """
    if array.dtype.kind in "iub" and array.dtype.names is None and array.dtype.name != "bfloat16":
        return array
    wide = to_float32(array)
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float16)
    if not np.isfinite(narrow).all():
        peak = float(np.nanmax(np.abs(wide)))
        raise JobError(
            f"{name} holds values up to {peak:.4g}, which float16 (at most 65504) cannot hold; "
            "use a method whose result keeps bfloat16, or leave this model unquantized"
        )
    return narrow


def pack(name: str, linear: AffineLinear, layout: str, zero_points: bool | None = None) -> dict[str, NDArray[Any]]:
    """One quantized layer's tensors under their full names; its bias has to be float16 already.

    zero_points: whether to write them, where the layout can leave them out.
    """
    try:
        tensors = LAYOUTS[layout].write(linear, zero_points=zero_points)
    except UserError as error:
        raise JobError(f"{name}: {error}") from error
    return {f"{name}.{suffix}": array for suffix, array in tensors.items()}


def write_weights(output: Path, tensors: Iterable[Named], limit: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `limit` bytes with an index; one shard is held at a time."""
    parts: list[list[str]] = []
    held: dict[str, NDArray[Any]] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            write_safetensors(output / f"part-{len(parts)}.safetensors", held)
            parts.append(sorted(held))
            held, size = {}, 0

    for name, array in tensors:
        if size and size + array.nbytes > limit:
            flush()
        held[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(parts) == 1:
        (output / "part-0.safetensors").rename(output / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(parts):
        shard = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (output / f"part-{number}.safetensors").rename(output / shard)
        where.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_config(output / "model.safetensors.index.json", index)


def left_float(skipped: Sequence[str]) -> dict[str, Any]:
    """How a GPTQ config names linears that were left in float; nothing where there are none."""
    if not skipped:
        return {}
    described = describe("gptq", bits=4, group_size=-1, symmetric=True, modules_to_not_convert=skipped)
    return {"dynamic": described["dynamic"], "modules_to_not_convert": list(skipped)}


def described(
    job: Mapping[str, Any],
    layout: str,
    widths: Mapping[str, tuple[int, int]],
    skipped: Sequence[str],
    *,
    symmetric: bool,
    desc_act: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a result; linears that differ from the job's bits and groups are named one by one.

    Args:
        widths: quantized linear -> bits, group size. skipped: linears left in float.

    Raises:
        JobError: the layout has no way to say this.
    """
    main = (int(job["bits"]), int(job["group_size"]))
    with refusals():
        return describe(
            layout, bits=main[0], group_size=main[1], symmetric=symmetric, desc_act=desc_act,
            modules_to_not_convert=skipped, quantized_head=LM_HEAD in widths,
            overrides={name: LayerSettings(*own, symmetric) for name, own in widths.items() if own != main},
        )  # fmt: skip


def write_configs(
    source: Path, output: Path, source_config: Mapping[str, Any], quantization: Mapping[str, Any]
) -> None:
    """Write config.json, quantize_config.json where readers look for it, and copy the model's other files."""
    saved = {"quantization_config": dict(quantization), "dtype": "float16"}
    write_config(output / "config.json", restore_config(source_config, saved))
    own = own_file(quantization)
    if own is not None:
        # AutoGPTQ looks for a file named after bits and group unless it is told the name.
        extra = {"model_name_or_path": None, "model_file_base_name": "model"}
        write_config(output / own, {**quantization, **extra})
    for path in sorted(source.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
            continue
        if path.is_dir():
            shutil.copytree(path, output / path.name)
        else:
            shutil.copyfile(path, output / path.name)


def verify(output: Path, quantized: Iterable[str]) -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """Read the result back: (float name, values, whether it is a quantized weight) of every tensor.

    Raises:
        RuntimeError: other layers are quantized in the file than were quantized in memory.
    """
    found = set(quantized_layers(Checkpoint.open(output), quantization_of(output)))
    if found != set(quantized):
        raise RuntimeError(f"written and quantized layers differ: {sorted(found ^ set(quantized))[:8]}")
    for name, values in iter_dequantized(output):
        yield name, values, name.removesuffix(".weight") in found
