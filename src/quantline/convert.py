"""Bring a quantized checkpoint into the layout that its serving target reads, and prove that nothing changed.

Where the layout serves as it is, the files are carried over. Otherwise each quantized linear is read into the middle form,
written in the target's layout, and read back from the disk: codes and zero points must be equal, scales equal up to the
cast that the proof names. What a target cannot hold is refused before anything is written, all of it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.conversion.engine import carry_file, write_description, write_weights
from quantline.conversion.faults import ConversionError
from quantline.conversion.plan import LayerFacts, examine, make_plan, parse_size
from quantline.conversion.proof import CarriedProof, LinearProof, Proof, check_output
from quantline.conversion.source import MSMODELSLIM, Source, open_source
from quantline.errors import UserError
from quantline.formats.container import read_json
from quantline.lineage import file_hashes
from quantline.serving_rules import Target, facts_of, verdict

# convert.target -> layout
TARGETS = {"awq": "awq_gemm", "gptq": "gptq", "gptq_v2": "gptq_v2", "compressed_tensors": "compressed_tensors"}


@dataclass(frozen=True)
class Options:
    """What a conversion may do.

    target: auto, keep, or a key of `TARGETS`. shard_size: of the output files, such as 4GB. requantize_outliers: quantize
    groups again that have no exact zero point. serving: the target that the result should load on, with its device.
    must_serve: refuse what that target cannot load, instead of warning.
    """

    target: str = "auto"
    shard_size: str = "4GB"
    requantize_outliers: bool = False
    serving: Target | None = None
    must_serve: bool = False
    threads: int = 2


def choose_layout(target: str, source: Source, symmetric: bool) -> str:
    """The layout to write. `auto` keeps what vLLM reads and brings the rest to its nearest kin that vLLM does read.

    Raises:
        UserError: `keep` of what no server reads.
    """
    if source.layout == MSMODELSLIM:
        if target == "keep":
            raise UserError(f"convert.target=keep: a {source.kind} checkpoint serves nowhere as it is; name a target")
        bits = {layer.bits for layer in source.layers.values()}
        nearest = "awq_gemm" if bits == {4} else "compressed_tensors"
        return nearest if target == "auto" else TARGETS[target]
    if target == "keep":
        return source.layout
    if target != "auto":
        return TARGETS[target]
    if source.layout == "awq_gemv":
        return "awq_gemm"
    # Some readers do not mask the v1 field of a zero point 0, so only symmetric checkpoints go back to v1.
    return "gptq" if source.layout == "gptq_v2" and symmetric else source.layout


def convert(source: Path, out: Path, options: Options, *, kind: str = "auto") -> Proof:
    """Write the checkpoint in `source` to the empty folder `out`; the caller removes `out` if this raises.

    Raises:
        ConversionError: everything that speaks against it, before anything is written.
        ProofError: what was written does not read back.
        FormatError: codes that are not what the checkpoint says, seen while it was written.
    """
    opened = open_source(source, kind)
    promised = opened.info is not None and opened.info.symmetric
    layout = choose_layout(options.target, opened, promised)
    proof = _keep(opened, out, options) if layout == opened.layout else _rewrite(opened, layout, out, options)
    proof.write(out)
    return proof


def _rewrite(source: Source, layout: str, out: Path, options: Options) -> Proof:
    limit = parse_size(options.shard_size)
    plan = make_plan(source, layout, requantize=options.requantize_outliers, shard_bytes=limit)
    notes = [*plan.warnings, *serving_notes(plan.settings, source, options)]
    linears, carried = write_weights(plan, out, options.threads)
    left_out = write_description(plan, out)
    check_output(out, linears, carried, layout)
    return Proof(source.kind, layout, True, linears, carried, source.left_out, left_out, notes)


def _keep(source: Source, out: Path, options: Options) -> Proof:
    facts, faults = examine(source, source.layout, requantize=False, threads=options.threads)
    if source.faults or faults or not facts:
        raise ConversionError(
            [*source.faults, *faults] or ["it holds no quantized linear; give a quantized checkpoint"]
        )
    settings = read_json(source.folder / "config.json").get("quantization_config", {})
    notes = [*source.warnings, *serving_notes(settings, source, options)]
    for path in sorted(source.folder.iterdir()):
        if path.is_file():
            carry_file(path, out / path.name)
    linears = [_kept(source, name, fact) for name, fact in sorted(facts.items())]
    hashes = file_hashes(out)
    # Each file has the bytes of the source's, so each tensor has.
    differing = [
        name for name, value in file_hashes(source.folder).items() if "/" not in name and hashes[name] != value
    ]
    if differing:
        raise UserError(f"{differing[0]}: changed while it was carried over; run it again")
    carried = [CarriedProof(name, old, "", source.tensors.infos[old].nbytes) for name, old in source.carried.items()]
    return Proof(source.kind, source.layout, False, linears, carried, {}, {}, notes, hashes)


def _kept(source: Source, name: str, fact: LayerFacts) -> LinearProof:
    layer = source.layers[name]
    return LinearProof(
        name, layer.bits, layer.group_size, layer.in_features, layer.out_features, fact.symmetric, "equal", 0.0
    )


def serving_notes(settings: Mapping[str, Any], source: Source, options: Options) -> list[str]:
    """What is known against serving the result on the configured target.

    Raises:
        ConversionError: something is, and it must serve.
    """
    if options.serving is None:
        return []
    layers = source.layers.values()
    whole = all(layer.in_features % 32 == 0 and layer.out_features % 32 == 0 for layer in layers)
    known = verdict(options.serving, facts_of(settings, widths_divisible_by_32=whole))
    if known.supported:
        return []
    where = f"{options.serving.runtime} {options.serving.version} on {options.serving.device}"
    note = f"{where} will not serve it: {known.reason}; {known.remedy}"
    if options.must_serve:
        raise ConversionError([f"convert.for={options.serving.runtime}: {note}"])
    return [note]
