"""Carry over the files of a checkpoint that already has the wanted layout, and hash them in one read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_files import beside, files_of, weight_map
from quantline.checkpoints.safetensors_file import TensorInfo
from quantline.conversion.config_files import A_PICKLE, carry_file, is_pickle
from quantline.conversion.errors import ConversionError
from quantline.conversion.facts import LayerFacts
from quantline.conversion.plan import examine
from quantline.conversion.proof import PROOF_NAME, CarriedProof, LinearProof, Proof
from quantline.conversion.source import Source
from quantline.core.errors import UserError
from quantline.core.files import read_json, sha256_of, write_json

_CHUNK = 1 << 22


def facts_of_kept(source: Source, threads: int) -> Mapping[str, LayerFacts]:
    """Facts about the linears' scales and zero points.

    Raises:
        ConversionError: all faults of the checkpoint.
    """
    facts, faults = examine(source, source.layout, requantize=False, threads=threads)
    if source.faults or faults or not facts:
        raise ConversionError(
            [*source.faults, *faults] or ["it holds no quantized linear; give a quantized checkpoint"]
        )
    return facts


def keep(
    source: Source, facts: Mapping[str, LayerFacts], out: Path, section: Mapping[str, Any], notes: list[str]
) -> Proof:
    """Carry every file over, all weights beside their index; pickles, which can run code, are left out.

    Written anew are a config.json without the section that servers look for, with it, and the index of weights in folders.

    Raises:
        UserError: a file changed while it was carried over.
    """
    weights = set(source.tensors.files.values())
    files: dict[str, str] = {}
    tensors: dict[str, str] = {}
    told = read_json(source.folder / "config.json").get("quantization_config") or not section
    here = files_of(source.folder)
    moved: dict[str, str] = {}
    for name in here:
        if name.endswith(".safetensors.index.json") and weights == set(weight_map(source.folder / name).values()):
            moved, index = beside(source.folder / name)
            if moved:
                write_json(out / name, index)
                files[name] = sha256_of(out / name)
    stale = set(moved.values()) - weights
    pickles = {name: A_PICKLE for name in here if is_pickle(name)}
    for name in sorted({*here, *weights} - set(files) - stale - {PROOF_NAME} - set(pickles)):
        path, target = source.folder / name, out / moved.get(name, name)
        if name == "config.json" and not told:
            write_json(target, {**source.config, "quantization_config": dict(section)})
            files[name] = sha256_of(target)
            continue
        carry_file(path, target)
        infos = {old: source.tensors.infos[old] for old, file in source.tensors.files.items() if file == name}
        whole, own = hashes_of(target, infos)
        files[target.relative_to(out).as_posix()] = whole
        tensors.update(own)
        # A hard link has the same bytes.
        if not target.samefile(path) and sha256_of(path) != whole:
            raise UserError(f"{name}: changed while it was carried over; run it again")
    linears = [_kept(source, name, fact, tensors) for name, fact in sorted(facts.items())]
    carried = [
        CarriedProof(name, old, tensors[old], source.tensors.infos[old].nbytes) for name, old in source.carried.items()
    ]
    return Proof(source.kind, source.layout.name, False, linears, carried, {}, pickles, notes, files)


def _kept(source: Source, name: str, fact: LayerFacts, tensors: Mapping[str, str]) -> LinearProof:
    layer = source.layers[name]
    return LinearProof(
        name, layer.bits, layer.group_size, layer.in_features, layer.out_features, fact.symmetric, "equal", 0.0,
        sha256={suffix: tensors[old] for suffix, old in layer.tensors.items()},
    )  # fmt: skip


def hashes_of(path: Path, infos: Mapping[str, TensorInfo]) -> tuple[str, dict[str, str]]:
    """SHA-256 of a file and of the bytes of each of its tensors, from one read.

    The file's hash is computed in a second thread.
    """
    whole = hashlib.sha256()
    digests: dict[str, Any] = {name: hashlib.sha256() for name in infos}
    places = sorted((info.offset, info.offset + info.nbytes, name) for name, info in infos.items())
    first, position = 0, 0
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        while chunk := file.read(_CHUNK):
            job = pool.submit(whole.update, chunk)
            end, view = position + len(chunk), memoryview(chunk)
            while first < len(places) and places[first][1] <= position:
                first += 1
            for start, stop, name in places[first:]:
                if start >= end:
                    break
                digests[name].update(view[max(0, start - position) : stop - position])
            job.result()
            position = end
    return whole.hexdigest(), {name: digest.hexdigest() for name, digest in digests.items()}
