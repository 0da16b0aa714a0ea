"""Names of variants: NAME, or MODEL/NAME where params.yaml has several models.

One name stands everywhere: below artifacts/ and variants/, on the command line, in MLflow. Each model has its own `float`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantline.config.method import BASELINE


def model_of(name: str) -> str:
    """The model in a variant's name; empty where params.yaml has one model."""
    return name.rpartition("/")[0]


def own_name(name: str) -> str:
    """A variant's name without its model."""
    return name.rpartition("/")[2]


def joined(model: str, name: str) -> str:
    """The name of a model's variant. model: empty where there is one."""
    return f"{model}/{name}" if model else name


def baseline_of(name: str) -> str:
    """The name of the float baseline that a variant is compared with."""
    return joined(model_of(name), BASELINE)


def is_baseline_name(name: str) -> bool:
    """Whether a name is that of a float baseline."""
    return own_name(name) == BASELINE


def file_name(name: str) -> str:
    """A variant's name as a part of a path, and in DVC's names of stages, which are `quantize@MODEL-NAME`."""
    return name.replace("/", "-")


def dvc_stage(stage: str, name: str, *, shared: bool = False) -> str:
    """What DVC calls a stage of a variant, see dvc.yaml. shared: all variants of a model share its output."""
    model = model_of(name)
    if shared or is_baseline_name(name):
        base = stage if shared else f"{stage}_baseline"
        return f"{base}@{model}" if model else base
    return f"{stage}@{file_name(name)}"


def frozen_name(config: Mapping[str, Any], name: str) -> str:
    """The whole name of a frozen variant, which the report of one model shows without the model."""
    return str((config.get("frozen") or {}).get("variant") or name)


def named_pairs(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of model and variant that params.yaml asks for, by model; without models, ("", variant).

    content: of params.yaml. Nothing is checked.
    """
    models, variants = list(map(str, content.get("models") or [""])), list(map(str, content.get("variants") or {}))
    every = [(model, variant) for model in models for variant in variants]
    if content.get("pairs") is None:
        return every
    asked = set(map(str, content["pairs"]))
    return [pair for pair in every if joined(*pair) in asked]


def all_names(content: Mapping[str, Any]) -> list[str]:
    """The names of all variants of params.yaml, each model's float baseline before its others. Nothing is checked."""
    pairs = named_pairs(content)
    models = list(map(str, content.get("models") or [""]))
    return [
        joined(model, name)
        for model in models
        for name in (BASELINE, *(variant for of, variant in pairs if of == model))
    ]
