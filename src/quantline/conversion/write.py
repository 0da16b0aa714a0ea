"""Execute a conversion plan, linear by linear and shard by shard, and read each linear back from the disk once written.

Threads share the linears. Each thread has one linear in memory; tensors that are carried over are copied in pieces. Files
get their final names when they are complete. The caller owns the folder and removes it if anything is raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.layouts import FormatError, round_scales
from quantline.checkpoints.layouts.affine import Grid
from quantline.checkpoints.layouts.packing import turned
from quantline.checkpoints.safetensors_stream import StreamedFile, flushed, streamed
from quantline.conversion import bands
from quantline.conversion.errors import ProofError
from quantline.conversion.plan import ConversionPlan, Shard
from quantline.conversion.proof import CarriedProof, LinearProof, same_layer
from quantline.conversion.source import Source, SourceLayer
from quantline.core.files import write_json
from quantline.core.progress import bar


def write_weights(plan: ConversionPlan, out: Path, threads: int = 2) -> tuple[list[LinearProof], list[CarriedProof]]:
    """Write all shards and the index, and verify every tensor by reading it back from the disk.

    Raises:
        ProofError: a tensor does not read back as it was written.
        FormatError: a linear's codes contradict its description.
        OSError: the disk failed.
    """
    linears: list[LinearProof] = []
    carried: list[CarriedProof] = []
    total = sum(spec.nbytes for shard in plan.shards for spec in shard.specs.values())
    done = 0
    with bar(f"convert to {plan.layout.name}") as progress:
        for shard in plan.shards:
            with (
                streamed(out / shard.name, shard.specs) as file,
                closing(_work(plan, shard, file, threads)) as work,
            ):
                for outcome, name in work:
                    if isinstance(outcome, LinearProof):
                        linears.append(outcome)
                        done += _layer_bytes(plan, shard, name)
                    else:
                        carried.append(outcome)
                        done += shard.specs[name].nbytes
                    progress.update(done, total, name)
    if len(plan.shards) > 1:
        weight_map = {name: shard.name for shard in plan.shards for name in shard.specs}
        write_json(out / plan.index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sorted(linears, key=lambda proof: proof.name), sorted(carried, key=lambda proof: proof.name)


def _layer_bytes(plan: ConversionPlan, shard: Shard, layer: str) -> int:
    suffixes = [suffix for suffix in plan.layout.tensors if suffix != "bias"]
    return sum(shard.specs[f"{layer}.{suffix}"].nbytes for suffix in suffixes if f"{layer}.{suffix}" in shard.specs)


def _work(
    plan: ConversionPlan, shard: Shard, file: StreamedFile, threads: int
) -> Generator[tuple[LinearProof | CarriedProof, str], None, None]:
    """Outcomes and names as jobs finish. The first exception of a thread is raised here and cancels pending jobs."""
    in_bands = bands.worth_it(plan)
    with flushed(file) as news, ThreadPoolExecutor(threads) as pool:
        jobs: dict[Future[LinearProof | CarriedProof], str] = {}
        for name, old in shard.carried.items():
            jobs[pool.submit(_carry, plan.source, name, old, shard, file)] = name
        for name in shard.layers:
            jobs[pool.submit(_linear, plan, name, file, in_bands)] = name
        try:
            for job in as_completed(jobs):
                outcome = job.result()
                news.set()
                yield outcome, jobs[job]
        finally:
            pool.shutdown(cancel_futures=True)


def _linear(plan: ConversionPlan, name: str, file: StreamedFile, in_bands: bool) -> LinearProof:
    layer = plan.source.layers[name]
    report = None
    try:
        if in_bands and bands.fits(plan, layer):
            before, after = bands.convert(plan, layer, file)
        else:
            before, after, report = _whole(plan, layer, file)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from error
    cast = before.scales is not after.scales
    return LinearProof(
        name=name, bits=layer.bits, group_size=layer.group_size, in_features=layer.in_features,
        out_features=layer.out_features, symmetric=after.symmetric,
        scales=f"{before.scales.dtype} to {after.scales.dtype}" if cast else "equal",
        largest_relative_difference=plan.facts[name].scale_loss if cast else 0.0,
        requantized=() if report is None else tuple(report.records()),
    )  # fmt: skip


def _whole(plan: ConversionPlan, layer: SourceLayer, file: StreamedFile) -> tuple[Grid, Grid, Any | None]:
    before, report = plan.source.read(layer, plan.requantize)
    after = round_scales(before) if plan.cast_scales and before.scales.dtype != np.float16 else before
    for suffix, array in plan.layout.write(after, zero_points=plan.zero_points).items():
        file.put(f"{layer.name}.{suffix}", array)
    stored = {
        suffix: file.get(f"{layer.name}.{suffix}")
        for suffix in plan.layout.tensors
        if suffix != "bias" and f"{layer.name}.{suffix}" in file.infos
    }
    codes, affine = plan.layout.codes, plan.layout.affine
    # Codes compare many times faster in the memory order of the source.
    if affine is not None and before.codes.flags.c_contiguous == affine.rows_are_outputs:
        stored[codes] = turned(stored[codes]).T
    try:
        again = plan.layout.read(stored, bits=layer.bits, group_size=layer.group_size)
    except FormatError as error:
        raise ProofError(f"{layer.name}: what was written to {file.path.name} does not read back: {error}") from error
    if faults := same_layer(after, again):
        raise ProofError(f"{layer.name}: {', '.join(faults)} read back from {file.path.name} differ from the source's")
    return before.grid, after.grid, report


def _carry(source: Source, name: str, old: str, shard: Shard, file: StreamedFile) -> CarriedProof:
    spec, digest = shard.specs[name], hashlib.sha256()
    file.put_chunks(name, spec.dtype, spec.shape, source.tensors.chunks(old))
    for chunk, written in zip(source.tensors.chunks(old), file.chunks(name), strict=True):
        if chunk != written:
            raise ProofError(f"{name}: reads back from {file.path.name} with other bytes than {old} of the source")
        digest.update(written)
    return CarriedProof(name, old, digest.hexdigest(), spec.nbytes)
