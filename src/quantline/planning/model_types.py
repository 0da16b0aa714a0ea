"""Whether the reference engine knows a type of model, decided by `model_types.yaml` without building anything."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from quantline.checkpoints.model_config import WITH_IMAGES


def why_unknown(config: Mapping[str, Any], version: str) -> str | None:
    """Why the reference engine does not build the model of a config.json, with the remedy; None if nothing is against it.

    version: of transformers in its environment. Nothing is known of versions that the table does not name.
    """
    kind, named = str(config.get("model_type")), config.get("architectures") or [None]
    for entry in _table():
        if not SpecifierSet(entry["versions"]).contains(Version(version), prereleases=True):
            continue
        if lacking := entry["lacks"].get(kind):
            reason = f"also needs {lacking}, which the environment of the reference engine does not have"
        elif kind not in WITH_IMAGES and kind not in entry["causal"]:
            reason = f"the reference engine, with transformers {version}, builds no causal LM of that type"
        elif named[0] in entry["whole"]:
            reason = f"architectures names {named[0]}, of which the reference engine builds the language model alone"
        else:
            return None
        return (
            f"model_type={kind} in config.json: {reason}; give a model of another type, or name an interpreter that has "
            "what it needs: toolchains.reference=PYTHON"
        )
    return None


@cache
def _table() -> tuple[dict[str, Any], ...]:
    text = resources.files("quantline.planning").joinpath("model_types.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))
