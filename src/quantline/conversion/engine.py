"""Write what a plan says: linear by linear, shard by shard, each linear read back from the disk as soon as it is there.

Large files are written by two processes. In memory are the linears that are being worked on, one in each; tensors that
are carried over pass in pieces. Files appear under their names when they are whole. The folder is the caller's, who
removes it if anything is raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.conversion.faults import ProofError
from quantline.conversion.plan import Plan, Shard, scale_loss
from quantline.conversion.proof import CarriedProof, LinearProof, same_layer
from quantline.conversion.source import MSMODELSLIM, Source, SourceLayer
from quantline.conversion.targets import FORMS, MSMODELSLIM_PACKED
from quantline.conversion.workers import can_fork, forked
from quantline.formats import FormatError, QuantizedLinear, compressed_tensors, round_scales
from quantline.formats.packing import turned
from quantline.formats.streaming import StreamedFile, flushed, streamed
from quantline.jobs import write_json
from quantline.progress import bar

# Bytes of an output file from which on processes pay for themselves.
FORK_BYTES = 1 << 26
# Layouts that store codes (out, in); the others (in, out).
_ROWS_ARE_OUTPUTS = ("awq_gemv", "compressed_tensors", MSMODELSLIM, MSMODELSLIM_PACKED)
_CODES = {"qweight", "weight_packed", "weight"}
# Tensors without output channels: the same for every piece of a linear, or (weight_shape) stating their number.
_WHOLE = {"g_idx", "weight_g_idx", "weight_shape"}


def write_weights(plan: Plan, out: Path, threads: int = 2) -> tuple[list[LinearProof], list[CarriedProof]]:
    """Write all shards and the index; prove every tensor by what the disk gives back.

    Raises:
        ProofError: something reads back as something else.
        FormatError: a linear's codes are not what its description says.
        OSError: the disk.
    """
    linears: list[LinearProof] = []
    carried: list[CarriedProof] = []
    total = sum(spec.nbytes for shard in plan.shards for spec in shard.specs.values())
    done = 0
    try:
        with bar(f"convert to {plan.layout}") as progress:
            for shard in plan.shards:
                with (
                    streamed(out / shard.name, shard.specs) as file,
                    closing(_work(plan, shard, file, threads)) as work,
                ):
                    for outcome, name in work:
                        if isinstance(outcome, LinearProof):
                            linears.append(outcome)
                            done += _layer_bytes(shard, name)
                        else:
                            carried.append(outcome)
                            done += shard.specs[name].nbytes
                        progress.update(done, total, name)
    finally:
        plan.source.tensors.close()
    if len(plan.shards) > 1:
        weight_map = {name: shard.name for shard in plan.shards for name in shard.specs}
        write_json(out / plan.index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sorted(linears, key=lambda proof: proof.name), sorted(carried, key=lambda proof: proof.name)


def _layer_bytes(shard: Shard, layer: str) -> int:
    suffixes = {suffix for layout in FORMS.values() for suffix in layout.TENSORS if suffix != "bias"}
    return sum(shard.specs[f"{layer}.{suffix}"].nbytes for suffix in suffixes if f"{layer}.{suffix}" in shard.specs)


def _work(
    plan: Plan, shard: Shard, file: StreamedFile, processes: int
) -> Generator[tuple[LinearProof | CarriedProof, str], None, None]:
    jobs: list[tuple[str, str | None]] = [*shard.carried.items(), *((layer, None) for layer in shard.layers)]

    def done(job: tuple[str, str | None]) -> tuple[LinearProof | CarriedProof, set[str]]:
        name, old = job
        before = set(file.written)
        outcome = _linear(plan, name, file) if old is None else _carry(plan.source, name, old, shard, file)
        return outcome, file.written - before

    if processes < 2 or sum(spec.nbytes for spec in shard.specs.values()) < FORK_BYTES or not can_fork():
        for job in jobs:
            yield done(job)[0], job[0]
        return
    # The processes before the thread that flushes: a fork takes over no thread, but the locks it holds.
    outcomes = forked(done, jobs, processes)
    first = next(outcomes)
    with flushed(file) as news, closing(outcomes):
        for job, (outcome, names) in chain([first], outcomes):
            file.came(names)
            news.set()
            yield outcome, job[0]


def _linear(plan: Plan, name: str, file: StreamedFile) -> LinearProof:
    layer = plan.source.layers[name]
    try:
        read = list(plan.source.pieces(layer, plan.requantize))
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    before = [piece for piece, _ in read]
    pieces = [
        round_scales(piece) if plan.cast_scales and piece.scales.dtype != np.float16 else piece for piece in before
    ]
    for suffix, array in _joined(plan, layer, pieces).items():
        file.put(f"{name}.{suffix}", array)
    for faults in _differences(plan.layout, layer, pieces, file):
        raise ProofError(f"{name}: {', '.join(faults)} read back from {file.path.name} differ from the source's")
    losses = [scale_loss(old, new) for old, new in zip(before, pieces, strict=True) if old is not new]
    return LinearProof(
        name=name, bits=layer.bits, group_size=layer.group_size, in_features=layer.in_features,
        out_features=layer.out_features, symmetric=all(piece.symmetric for piece in pieces),
        scales=f"{before[0].scales.dtype} to {pieces[0].scales.dtype}" if losses else "equal",
        largest_relative_difference=max(losses, default=0.0),
        requantized=tuple(group for _, report in read if report is not None for group in report.records()),
    )  # fmt: skip


def _joined(plan: Plan, layer: SourceLayer, pieces: list[QuantizedLinear]) -> dict[str, NDArray[Any]]:
    """The tensors of a linear, its pieces side by side along the output channels."""
    if len(pieces) == 1:
        return _written(plan, pieces[0])
    axis = _channel_axis(plan.layout)
    joined: dict[str, NDArray[Any]] = {}
    start = 0
    for piece in pieces:
        stop = start + piece.out_features
        for suffix, array in _written(plan, piece).items():
            if suffix in _WHOLE:
                joined[suffix] = np.array([layer.out_features, layer.in_features]) if array.size == 2 else array
                continue
            if suffix not in joined:
                shape = list(array.shape)
                shape[axis] = shape[axis] * layer.out_features // piece.out_features
                joined[suffix] = np.empty(shape, dtype=array.dtype)
            joined[suffix][_part(joined[suffix], axis, start, stop, layer.out_features)] = array
        start = stop
    return joined


def _written(plan: Plan, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    if plan.layout == "compressed_tensors":
        return compressed_tensors.write(linear, zero_points=plan.zero_points)
    return FORMS[plan.layout].write(linear)


def _differences(
    layout: str, layer: SourceLayer, pieces: list[QuantizedLinear], file: StreamedFile
) -> Iterator[list[str]]:
    """What of each piece is other in the file on the disk, as it is now; pieces without a difference are left out."""
    axis, start = _channel_axis(layout), 0
    stored = {
        suffix: file.get(f"{layer.name}.{suffix}")
        for suffix in FORMS[layout].TENSORS
        if suffix != "bias" and f"{layer.name}.{suffix}" in file.infos
    }
    for piece in pieces:
        stop, own = start + piece.out_features, dict(stored)
        for suffix, array in stored.items():
            if suffix not in _WHOLE:
                own[suffix] = array[_part(array, axis, start, stop, layer.out_features)]
            elif array.size == 2 and len(pieces) > 1:
                # The piece's own height; that the file's is the linear's is part of the comparison.
                own[suffix] = array - [layer.out_features - piece.out_features, 0]
            # Codes in the memory order of the source's compare many times faster.
            if suffix in _CODES and piece.codes.flags.c_contiguous == (layout in _ROWS_ARE_OUTPUTS):
                own[suffix] = turned(own[suffix]).T
        try:
            again = FORMS[layout].read(own, bits=layer.bits, group_size=layer.group_size)
        except FormatError as error:
            raise ProofError(
                f"{layer.name}: what was written to {file.path.name} does not read back: {error}"
            ) from error
        faults = same_layer(piece, again)
        if faults:
            yield faults
        start = stop


def _channel_axis(layout: str) -> int:
    return 0 if layout in _ROWS_ARE_OUTPUTS else 1


def _part(array: NDArray[Any], axis: int, start: int, stop: int, whole: int) -> tuple[slice, ...]:
    """The place of output channels start to stop in a tensor, packed or not, that holds `whole` of them along an axis."""
    size = array.shape[axis]
    place = slice(start * size // whole, stop * size // whole)
    return (place,) if axis == 0 else (slice(None), place)


def _carry(source: Source, name: str, old: str, shard: Shard, file: StreamedFile) -> CarriedProof:
    spec, digest = shard.specs[name], hashlib.sha256()
    file.put_chunks(name, spec.dtype, spec.shape, source.tensors.chunks(old))
    for chunk, written in zip(source.tensors.chunks(old), file.chunks(name), strict=True):
        if chunk != written:
            raise ProofError(f"{name}: reads back from {file.path.name} as other bytes than {old} of the source")
        digest.update(written)
    return CarriedProof(name, old, digest.hexdigest(), spec.nbytes)
