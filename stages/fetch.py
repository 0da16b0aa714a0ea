"""Download a promoted variant: a folder that vLLM serves, with its model card.

Examples:
    python -m stages.fetch model=quantline-demo alias=production out=models/production
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("model", "NAME", "as listed by `python -m stages.registry`", required=True),
    Option("alias", "NAME", "as listed by `python -m stages.registry`", required=True),
    Option("out", "DIR", "a new folder; every file is verified before it appears", required=True),
]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def fetch(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.tracking import registry
    from quantline.lifecycle.tracking.reader import tracking_of
    from quantline.pipeline.hydra_values import plain

    model, alias, out = (str(arguments[name]) for name in ("model", "alias", "out"))
    place = Path(out).expanduser().absolute()
    tracking = tracking_of(plain(cfg), HydraConfig.get().overrides.task, ROOT)
    version = registry.fetch(tracking, ROOT, model, alias, place)
    print(f"{model} version {version.version} ({version.tags['quantline.variant']}), every file verified -> {place}")
    if line := registry.serving_line(version, place):
        print(f"serve it here with `python -m stages.serve alias={alias} model={model}`, elsewhere with\n  {line}")


if __name__ == "__main__":
    main(fetch, __file__, OPTIONS, __doc__, reads=("tracking",))
