"""Convert a quantized checkpoint to the layout that its serving target reads, and prove that nothing changed.

If the target reads the source's layout, the files are carried over. Otherwise each quantized linear is read into the
intermediate form, written in the target's layout, and read back from the disk: codes and zero points must be equal, scales
equal up to the cast that the proof names. Everything that a target cannot hold is reported together, before any writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts import Layout
from quantline.checkpoints.layouts.choice import converted
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.quantization_config import described_in
from quantline.config.convert import ConvertConfig
from quantline.conversion.architecture import RunWorker, check_architecture
from quantline.conversion.config_files import write_description
from quantline.conversion.facts import LayerFacts
from quantline.conversion.passthrough import facts_of_kept, keep
from quantline.conversion.plan import ConversionPlan, make_plan
from quantline.conversion.proof import Proof, check_output
from quantline.conversion.serving_notes import serving_notes
from quantline.conversion.source import Source, open_source
from quantline.conversion.write import write_weights
from quantline.core.errors import UserError
from quantline.serving.rules import Target

__all__ = ["choose_layout", "convert"]


def choose_layout(target: str, source: Source, symmetric: bool) -> Layout:
    """The layout to write. `auto` keeps a layout that vLLM reads; others become the closest layout that it reads.

    Raises:
        UserError: `keep` for a layout that no server reads, or any other target for a layout without codes on a grid.
    """
    layout = source.layout
    if layout.affine is None and target not in ("auto", "keep"):
        raise UserError(
            f"convert.target={target}: {layout.name}'s weights have no codes on a grid to convert; set "
            "convert.target=keep, or quantize the float model with method=rtn, gptq or awq"
        )
    if target == "keep" and not layout.servable:
        raise UserError(f"convert.target=keep: no server reads a {source.kind} checkpoint as it is; set another target")
    specs = {LinearSpec(layer.bits, layer.group_size) for layer in source.layers.values()}
    reordered = source.info is not None and source.info.desc_act and any(one.group_size != -1 for one in specs)
    return converted(layout, target, specs, symmetric=symmetric, reordered=reordered)


def convert(
    source: Path,
    out: Path,
    options: ConvertConfig,
    *,
    kind: str = "auto",
    serving: Target | None = None,
    threads: int = 2,
    run_worker: RunWorker | None = None,
) -> Proof:
    """Write the checkpoint in `source` to the empty folder `out`; the caller removes `out` if this raises.

    Args:
        source: the quantized checkpoint.
        out: an empty folder.
        options: the section `convert` of the configuration.
        kind: auto, or the method of layouts that folders are recognised by.
        serving: the target that should load the result, with its device. Rules against it become warnings of the proof;
            if `options.must_serve` is set, they raise.
        threads: number of worker threads.
        run_worker: runs a job of the reference environment's worker that knows the architectures. Without it the proof
            says that names and shapes were not checked against the architecture.

    Raises:
        ConversionError: all reasons against the conversion, before anything is written.
        ProofError: the output does not read back as it was written.
        FormatError: codes that contradict the checkpoint's description, found while writing.
    """
    opened = open_source(source, kind)
    opened, checked = check_architecture(opened, run_worker)
    symmetric = opened.info is not None and opened.info.symmetric
    layout = choose_layout(options.target, opened, symmetric)

    def notes(settings: Mapping[str, Any], facts: Mapping[str, LayerFacts]) -> list[str]:
        if serving is None:
            return []
        must_serve = options.must_serve is not None
        return serving_notes(serving, opened, layout, settings, facts, must_serve=must_serve)

    if layout is opened.layout and layout.servable:
        proof = _keep(opened, out, notes, threads)
    else:
        requantize, limit = options.requantize_outliers, options.shard_bytes
        plan = make_plan(opened, layout, requantize=requantize, shard_bytes=limit)
        proof = _rewrite(plan, out, [*plan.warnings, *notes(plan.settings, plan.facts)], threads)
    proof = replace(proof, architecture=checked)
    proof.write(out)
    return proof


Notes = Callable[[Mapping[str, Any], Mapping[str, LayerFacts]], list[str]]


def _rewrite(plan: ConversionPlan, out: Path, notes: list[str], threads: int) -> Proof:
    linears, carried = write_weights(plan, out, threads)
    left_out = write_description(plan, out)
    check_output(out, linears, carried, plan.layout)
    source = plan.source
    return Proof(source.kind, plan.layout.name, True, linears, carried, source.left_out, left_out, notes)


def _keep(source: Source, out: Path, notes: Notes, threads: int) -> Proof:
    facts = facts_of_kept(source, threads)
    found = described_in(source.folder)
    settings = found[1] if found is not None else {}
    return keep(source, facts, out, settings, [*source.warnings, *notes(settings, facts)])
