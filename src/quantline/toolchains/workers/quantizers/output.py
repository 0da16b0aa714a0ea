"""Writes every quantizer's result to disk, whichever library computed it. NumPy only.

A result is a complete model folder: weights in the layouts of `checkpoints.layouts`; all other tensors in float16 (as
AutoAWQ and AutoGPTQ save them and as their kernels need them); the source's config.json with a `quantization_config`; and
its tokenizer and generation files, copied byte for byte. Equal jobs give equal bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, quantized_layers, to_float32, write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS, AffineLinear, Storage
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LinearSpec
from quantline.checkpoints.linears import modules_left
from quantline.checkpoints.model_config import read_config, restore_config, write_config
from quantline.checkpoints.model_files import COMPANIONS, matching
from quantline.checkpoints.quantization_config import LayerSettings, describe, is_quantized, own_file, quantization_of
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError

SHARD_BYTES = 4_000_000_000


Named = tuple[str, NDArray[Any]]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn errors that a user can fix into a JobError, which the parent gets as a message."""
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
    if is_quantized(config):
        raise JobError(f"{model_dir} is quantized already; give the float model it was made from")
    return config


def method_options(job: Mapping[str, Any], defaults: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The defaults, overridden by the job's options.

    Raises:
        JobError: the method does not have an option.
    """
    given = dict(job.get("options") or {})
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise JobError(f"options {', '.join(unknown)}: {method} has {', '.join(sorted(defaults))}; remove the others")
    return {**defaults, **given}


def check_shapes(widths: Mapping[str, tuple[int, int]], layout: str, bits: int, group_size: int) -> None:
    """Refuse, before any computation, shapes that the layout cannot represent.

    Args:
        widths: linear layer -> (in_features, out_features).

    Raises:
        JobError: there is no layer, or layers do not fit; all are listed.
    """
    if not widths:
        raise JobError(
            "no linear layer was found inside the decoder layers, so nothing would be quantized; check the model"
        )
    faults = []
    for name, (in_features, out_features) in widths.items():
        if LAYOUTS[layout].affine is not None and group_size != -1 and in_features % group_size:
            faults.append(f"{name}: group_size={group_size} does not divide its input width {in_features}")
            continue
        found = LAYOUTS[layout].faults((in_features, out_features), LinearSpec(bits, group_size), Storage())
        faults += [f"{name}: {fault.fact}" for fault in found]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise JobError(
            f"{len(faults)} of {len(widths)} linear layers cannot be quantized:\n{listed}\n"
            "choose a group_size that divides every width, or -1 if the method allows one group per channel"
        )


def half(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Floating-point values as float16; integers and booleans unchanged.

    Raises:
        JobError: a value is not finite or exceeds float16's range (65504), as bfloat16 models can.
    """
    if array.dtype.kind in "iub" and array.dtype.names is None and array.dtype.name != "bfloat16":
        return array
    wide = to_float32(array)
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float16)
    if not np.isfinite(narrow).all():
        peak = float(np.nanmax(np.abs(wide)))
        raise JobError(
            f"{name} has values up to {peak:.4g}, but float16 holds at most 65504; "
            "use a method whose result keeps bfloat16, or leave this model unquantized"
        )
    return narrow


def pack(name: str, linear: AffineLinear, layout: str, zero_points: bool | None = None) -> dict[str, NDArray[Any]]:
    """One quantized layer's tensors by full name; its bias must be float16 already.

    zero_points: whether to write them, if the layout can omit them.
    """
    try:
        tensors = LAYOUTS[layout].write(linear, zero_points=zero_points)
    except UserError as error:
        raise JobError(f"{name}: {error}") from error
    return {f"{name}.{suffix}": array for suffix, array in tensors.items()}


def write_weights(output: Path, tensors: Iterable[Named], limit: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `limit` bytes with an index. Holds one shard in memory at a time."""
    parts: list[list[str]] = []
    shard_tensors: dict[str, NDArray[Any]] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard_tensors, size
        if shard_tensors:
            write_safetensors(output / f"part-{len(parts)}.safetensors", shard_tensors)
            parts.append(sorted(shard_tensors))
            shard_tensors, size = {}, 0

    for name, array in tensors:
        if size and size + array.nbytes > limit:
            flush()
        shard_tensors[name] = array
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
    """A GPTQ config's entries for linears that were left in float; empty if there are none."""
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
    """The `quantization_config` of a result; linears that differ from the job's bits and groups are listed by name.

    Args:
        widths: quantized linear -> bits, group size. skipped: linears left in float.

    Raises:
        JobError: the layout's config cannot express this.
    """
    main = (int(job["bits"]), int(job["group_size"]))
    with refusals():
        return describe(
            layout, bits=main[0], group_size=main[1], symmetric=symmetric, desc_act=desc_act,
            modules_to_not_convert=modules_left(skipped, widths), quantized_head=LM_HEAD in widths,
            overrides={name: LayerSettings(*width, symmetric) for name, width in widths.items() if width != main},
        )  # fmt: skip


def write_configs(
    source: Path, output: Path, source_config: Mapping[str, Any], quantization: Mapping[str, Any]
) -> None:
    """Write config.json, and quantize_config.json if readers need it; copy the model's other files."""
    saved = {"quantization_config": dict(quantization), "dtype": "float16"}
    write_config(output / "config.json", restore_config(source_config, saved))
    config_name = own_file(quantization)
    if config_name is not None:
        # Without the name, AutoGPTQ looks for a weights file named after bits and group size.
        extra = {"model_name_or_path": None, "model_file_base_name": "model"}
        write_config(output / config_name, {**quantization, **extra})
    for name in matching(source, COMPANIONS):
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, output / name)


def verify(output: Path, quantized: Iterable[str]) -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """Read the result back; yield (float name, values, whether it is a quantized weight) for every tensor.

    Raises:
        RuntimeError: the layers quantized in the file differ from those quantized in memory.
    """
    found = set(quantized_layers(Checkpoint.open(output), quantization_of(output)))
    if found != set(quantized):
        raise RuntimeError(
            f"the layers quantized in the file and in memory differ: {sorted(found ^ set(quantized))[:8]}"
        )
    for name, values in iter_dequantized(output):
        yield name, values, name.removesuffix(".weight") in found
