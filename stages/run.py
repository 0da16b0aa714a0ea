"""Run a variant by hand up to a stage: what is missing, in order, its float baseline included.

It is what the stages' own commands do one by one. Results lie in scratch/, and what exists with the same fingerprint is not
made again.

Examples:
    python -m stages.run method=gptq bits=8
    python -m stages.run method=gptq bits=8 until=speed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, WORK, main

OPTIONS = [
    Option(  # spelled out: completion reads it without importing this module
        "until", "STAGE", "the last stage",
        allowed=("evaluate", "download", "calibrate", "quantize", "convert", "serve_smoke", "tasks", "speed"),
    ),
]  # fmt: skip
READS = ("model", "method", "bits", "group_size", "backend", "calibration", "layers", "convert", "variant", "device")

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import importlib
    import sys

    from hydra.core.hydra_config import HydraConfig

    from quantline.pipeline.config import parse
    from quantline.pipeline.execute import check_caller, run_until
    from quantline.pipeline.hydra_values import plain

    config, overrides = parse(plain(cfg)), list(HydraConfig.get().overrides.task)
    check_caller(config, overrides)
    for name in OPTIONS[0].allowed:
        importlib.import_module(f"stages.{name}")
    until = str(arguments["until"])
    ran = run_until(until, WORK, config, ROOT, overrides)
    if not ran:
        print(f"nothing to run: {until} of this variant is there", file=sys.stderr)
    if config.tracking.enabled:
        from quantline.lifecycle.publish import publish_by_hand

        for variant in ran:
            publish_by_hand(config, variant, ROOT)


if __name__ == "__main__":
    main(run, __file__, OPTIONS, __doc__, reads=READS)
