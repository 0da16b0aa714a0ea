"""Say whether a variant would work, and what it takes, before anything is computed: `python -m stages.plan method=gptq`.

Options of its own: gpu_memory_gb, critical (both also ask for a recommendation), context, batch, compute_capability, json.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stages import ROOT, main

OWN = """Options of stages.plan alone, the rest is the pipeline's:
  gpu_memory_gb=24         memory of each GPU: does it fit, and what is recommended; with device=auto a GPU is planned for
  critical=true            recommend what loses least, rather than what is small
  context=4096 batch=8     tokens of a sequence, and sequences at a time; else serve.max_model_len and concurrency
  compute_capability=8.9   of the GPU; else that of the one here
  json=true                the same as JSON
"""

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from quantline.pipeline.preflight import PlanOptions


def plan(cfg: DictConfig, options: PlanOptions) -> None:
    import json

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import ConfigError, UserError
    from quantline.pipeline import preflight
    from quantline.pipeline.config import parse
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.run import StageRun
    from quantline.planning.nearest import nearest
    from quantline.planning.preflight import check
    from quantline.planning.recommend import recommend
    from quantline.planning.report import as_json, as_text

    values = plain(cfg)
    try:
        config = parse(values)
    except ConfigError as error:
        near = preflight.hint(values, ROOT, options)
        raise UserError(f"{error}\n  the nearest that works: {near}" if near else str(error)) from None
    run = StageRun("plan", config, ROOT, tuple(HydraConfig.get().overrides.task))
    model, place, defaults = (
        preflight.model_of(run),
        preflight.place_of(config, ROOT, options),
        preflight.method_defaults(ROOT),
    )
    variant = preflight.planned_of(config.model_dump())
    found = check(variant, model, place)
    near = None if found.passes() else nearest(variant, model, place, defaults)
    choice = None
    if options.gpu_memory_gb is not None or options.critical:
        measured = preflight.measured_losses(ROOT, config)
        choice = recommend(variant, model, place, critical=options.critical, defaults=defaults, measured=measured)
    if options.as_json:
        print(json.dumps(as_json(found, model, place, near, choice), indent=2))
    else:
        print(as_text(found, model, place, near, choice))
    if not found.passes():
        reasons = ", ".join(dict.fromkeys(finding.id for finding in found.refused))
        raise UserError(f"this variant is refused ({reasons}){f'; the nearest that works: {near}' if near else ''}")


def entry() -> None:
    from quantline.core.errors import QuantlineError
    from quantline.pipeline.preflight import split_options

    if "--help" in sys.argv or "-h" in sys.argv:
        print(OWN)
    try:
        options, sys.argv[1:] = split_options(sys.argv[1:])
    except QuantlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    main(lambda cfg: plan(cfg, options), __file__)


if __name__ == "__main__":
    entry()
