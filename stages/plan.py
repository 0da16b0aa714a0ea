"""Check whether a variant would work and what it needs, before anything is computed.

With gpu_memory_gb or critical, it also recommends a variant.

Examples:
    python -m stages.plan method=gptq bits=8
    python -m stages.plan variant=awq-w4-g128
    python -m stages.plan model.repo=OWNER/NAME model.revision=COMMIT gpu_memory_gb=24 compute_capability=8.9
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option(
        "gpu_memory_gb",
        "24",
        "memory of each GPU, to check the fit and recommend a variant; device=auto then means a GPU",
    ),
    Option("critical", "true", "recommend the variant that loses least, not a small one"),
    Option("context", "4096", "tokens per sequence; default serve.max_model_len"),
    Option("batch", "8", "sequences at a time; default serve.process.concurrency"),
    Option("compute_capability", "8.9", "of the GPU, as NVIDIA writes it; default that of the local GPU"),
    Option("json", "true", "print JSON"),
]

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from omegaconf import DictConfig

READS = (
    "model", "method", "bits", "group_size", "backend", "backends", "dtype", "lm_head", "low_memory", "layers",
    "calibration", "convert", "serve", "evaluate", "tasks", "speed", "device",
)  # fmt: skip


def plan(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import json
    from dataclasses import replace

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import ConfigError, UserError
    from quantline.pipeline import preflight
    from quantline.pipeline.config import parse
    from quantline.pipeline.fit import remedy_with_model
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.overrides import with_variant
    from quantline.pipeline.run import StageRun
    from quantline.planning.nearest import nearest
    from quantline.planning.preflight import check
    from quantline.planning.recommend import suggest
    from quantline.planning.report import as_json, as_text
    from quantline.planning.stage_memory import stage_needs, too_large

    options, values, given = preflight.plan_options(arguments), plain(cfg), tuple(HydraConfig.get().overrides.task)
    if values["variant"] is not None and values.get("frozen") is None:
        values, given = _line_of(values["variant"], given), ()
    unpinned = preflight.pinned(values["model"])
    try:
        config = parse(values)
    except ConfigError as error:
        near = preflight.hint(values, ROOT, options)
        near = near and with_variant(given, near)
        raise UserError(f"{error}\n  the nearest that works: {near}" if near else str(error)) from None
    run = StageRun("plan", config, ROOT, given)
    model, place, defaults = (
        preflight.model_of(run, remote=True),
        preflight.machine_of(config, ROOT, options),
        preflight.method_defaults(ROOT),
    )
    preflight.refuse_beside_weights(config, ROOT)
    variant = preflight.variant_spec(config.model_dump())
    found = check(variant, model, place)
    near = None if found.passes() else nearest(variant, model, place, defaults)
    near = near and with_variant(given, near)
    lengths = preflight.length_findings(config, model)
    fits = not any(finding.refused for finding in lengths)  # otherwise the stages would say that again of the texts
    texts = (*preflight.text_findings(run, read=fits), *preflight.calibration_findings(run))
    memory = too_large(stage_needs(found, model, place), place)
    found = replace(found, findings=(*found.findings, *memory, *lengths, *texts))
    choice = None
    if options.gpu_memory_gb is not None or options.critical:
        measured = preflight.measured_losses(ROOT, config)
        choice = suggest(variant, model, place, critical=options.critical, defaults=defaults, measured=measured)
    if options.as_json:
        print(json.dumps(as_json(found, model, place, near, choice), indent=2))
    else:
        print(as_text(found, model, place, near, choice))
    for note in [*place.notes, *([unpinned] if unpinned else [])]:
        print(f"  note: {note}", file=sys.stderr)
    if not found.passes():
        reasons = ", ".join(dict.fromkeys(finding.id for finding in found.refused))
        mended = remedy_with_model(config, model.config)
        raise UserError(
            f"this variant is refused ({reasons}){f'; the nearest that works: {near}' if near else ''}"
            f"{f'; {mended}' if mended else ''}"
        )


def _line_of(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a variant of params.yaml.

    Raises:
        UserError: other options are given, too, or params.yaml has no such variant.
    """
    from quantline.core.errors import UserError
    from quantline.core.text import nearest
    from quantline.pipeline.compose import frozen_variant, read_params

    others = [override for override in overrides if not override.startswith("variant=")]
    if others:
        raise UserError(
            f"variant={name} {' '.join(others)}: a variant has its options in params.yaml; give either its name, or options"
        )
    known = list(read_params(ROOT / "params.yaml")["variants"])
    if name not in known:
        raise UserError(f"variant={name}: is not in params.yaml, which has {', '.join(known)}{nearest(name, known)}")
    return frozen_variant(ROOT, name)


if __name__ == "__main__":
    main(plan, __file__, OPTIONS, __doc__, reads=READS)
