"""The files that each variant of params.yaml names by path, by the stages that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.pipeline.compose import read_frozen, read_params
from quantline.pipeline.config import parse
from quantline.pipeline.stages import STAGES, of_config


def inputs_of_variants(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The content of inputs.yaml: by variant and stage, the hash of each file by its path, as the configuration names it.

    A shared stage is the baseline's. A variant that is not frozen yet is left out.

    Raises:
        UserError: params.yaml or a frozen configuration cannot be read.
    """
    found = {}
    for name in read_params(root / "params.yaml")["variants"]:
        path = root / "variants" / f"{name}.yaml"
        if path.is_file():
            config = parse(read_frozen(path))
            stages = [STAGES[stage] for stage in of_config(config)]
            found[name] = {
                stage.name: stage.inputs(config, root)
                for stage in stages
                if stage.inputs and (name == BASELINE or not stage.shared)
            }
    return found
