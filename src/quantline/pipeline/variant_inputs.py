"""What each stage of each variant of params.yaml reads: one hash over its options and the files that these name by path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.pipeline.compose import read_frozen, read_params
from quantline.pipeline.config import parse
from quantline.pipeline.names import is_baseline_name, model_of, own_name
from quantline.pipeline.paths import frozen_path
from quantline.pipeline.stages import STAGES, Stage, of_config


def inputs_of_variants(root: Path) -> dict[str, dict[str, Any]]:
    """The content of inputs.yaml.

    A shared stage is the baseline's. A variant that is not frozen yet is left out.

    Returns:
        reads: by variant and stage (where there are several models, by model, variant and stage), one hash over what the
            stage reads. DVC watches it.
        files: the hash of each file by its path, as the configuration names it.

    Raises:
        UserError: params.yaml or a frozen configuration cannot be read.
    """
    reads: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for name in read_params(root / "params.yaml")["variants"]:
        path = frozen_path(root, name)
        if not path.is_file():
            continue
        values = read_frozen(path)
        config = parse(values)
        own_reads = reads.setdefault(model_of(name), {}) if model_of(name) else reads
        own_reads[own_name(name)] = of_name = {}
        for stage in (STAGES[each] for each in of_config(config)):
            if stage.shared and not is_baseline_name(name):
                continue
            own = stage.inputs(config, root) if stage.inputs else {}
            files.update(own)
            of_name[stage.name] = _hash({"options": _options(stage, values), "files": own})
    return {"reads": reads, "files": files}


def _options(stage: Stage, values: Mapping[str, Any]) -> dict[str, Any]:
    keys = (*stage.reads, *(f"frozen.locks.{role}" for role in stage.locks))
    return {key: _value(values, key) for key in keys}


def _value(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def _hash(value: object) -> str:
    # Short, since `dvc params diff` shows the former and the new one side by side.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
