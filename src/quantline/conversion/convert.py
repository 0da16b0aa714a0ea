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

from quantline.checkpoints.layouts import TARGETS, Layout
from quantline.checkpoints.layouts.choice import converted
from quantline.conversion.config_files import write_description
from quantline.conversion.facts import LayerFacts
from quantline.conversion.passthrough import facts_of_kept, keep
from quantline.conversion.plan import make_plan, parse_size
from quantline.conversion.proof import Proof, check_output
from quantline.conversion.serving_notes import serving_notes
from quantline.conversion.source import Source, open_source
from quantline.conversion.write import write_weights
from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.serving.rules import Target

__all__ = ["TARGETS", "Options", "choose_layout", "convert"]


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


def choose_layout(target: str, source: Source, symmetric: bool) -> Layout:
    """The layout to write. `auto` keeps what vLLM reads and brings the rest to its nearest kin that vLLM does read.

    Raises:
        UserError: `keep` of what no server reads, or another layout than its own for one that is read as weights.
    """
    layout = source.layout
    if layout.affine is None and target not in ("auto", "keep"):
        raise UserError(
            f"convert.target={target}: {layout.name}'s weights have no codes on a grid, which other layouts hold; give "
            "convert.target=keep, or quantize the float model with method=rtn, gptq or awq"
        )
    if target == "keep" and not layout.servable:
        raise UserError(f"convert.target=keep: a {source.kind} checkpoint serves nowhere as it is; name a target")
    return converted(layout, target, {layer.bits for layer in source.layers.values()}, symmetric=symmetric)


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
    kept = layout is opened.layout and layout.servable
    proof = _keep(opened, out, options) if kept else _rewrite(opened, layout, out, options)
    proof.write(out)
    return proof


def _rewrite(source: Source, layout: Layout, out: Path, options: Options) -> Proof:
    limit = parse_size(options.shard_size)
    plan = make_plan(source, layout, requantize=options.requantize_outliers, shard_bytes=limit)
    notes = [*plan.warnings, *_notes(source, layout, plan.settings, plan.facts, options)]
    linears, carried = write_weights(plan, out, options.threads)
    left_out = write_description(plan, out)
    check_output(out, linears, carried, layout)
    return Proof(source.kind, layout.name, True, linears, carried, source.left_out, left_out, notes)


def _keep(source: Source, out: Path, options: Options) -> Proof:
    facts = facts_of_kept(source, options.threads)
    settings = read_json(source.folder / "config.json").get("quantization_config", {})
    return keep(source, facts, out, [*source.warnings, *_notes(source, source.layout, settings, facts, options)])


def _notes(
    source: Source, layout: Layout, settings: Mapping[str, Any], facts: Mapping[str, LayerFacts], options: Options
) -> list[str]:
    if options.serving is None:
        return []
    return serving_notes(options.serving, source, layout, settings, facts, must_serve=options.must_serve)
