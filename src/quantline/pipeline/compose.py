"""Freeze a variant: compose conf/ with its line in params.yaml, validate it, and write one file that DVC can depend on.

DVC's own Hydra mode recomposes only when params.yaml changes, not when conf/ does (docs/decisions/0001).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.core.files import replaced
from quantline.core.text import nearest
from quantline.pipeline.agreement import BASELINE_LINE, SHARED_LINE, refuse_contradictions
from quantline.pipeline.config import parse
from quantline.pipeline.fit import refuse_what_the_model_does_not_take
from quantline.pipeline.hydra_values import plain
from quantline.pipeline.identity import backends_of, locks_of
from quantline.pipeline.model_lines import MODELS, variant_lines
from quantline.pipeline.names import baseline_of, is_baseline_name, model_of, own_name
from quantline.pipeline.overrides import split
from quantline.pipeline.paths import checked_name, frozen_path
from quantline.pipeline.stages import refuse_source
from quantline.pipeline.yaml_file import read_yaml

_HEADER = "# Made by `python -m stages.compose variant={name}`; edit conf/ or params.yaml instead.\n"
_HYDRA = {"output_subdir": None, "run": {"dir": "."}, "sweep": {"dir": ".", "subdir": "."}}
_DEFAULTS = ["_self_", {"override hydra/job_logging": "stdout"}, {"override hydra/hydra_logging": "none"}]


def read_params(params: Path) -> dict[str, Any]:
    """The content of params.yaml: `shared`, `baseline`, `models`, and `variants` by name, the baseline the first of them.

    Where it has several models, `variants` has every pair that is to be built as MODEL/NAME, and each model's baseline.
    `own` are the lines of `variants` as they stand in the file.

    Raises:
        UserError: it is missing or malformed, a name is not valid as the name of a folder, or models, variants and pairs
            contradict each other.
    """
    content = read_yaml(params, "this file names the variants to build")
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise UserError(f"{params.name}: needs `variants:`, a mapping of names to overrides such as method=gptq bits=4")
    own: dict[str, Any] = {}
    for key, value in content["variants"].items():
        name = checked_name(str(key))
        if name in own:
            raise UserError(f"{params.name}: two variants are called {name}; give each a name of its own")
        own[name] = value
    return {**content, "own": own, "variants": variant_lines(content, params.name)}


def variant_overrides(params: Path, name: str) -> list[str]:
    """The Hydra overrides of a variant of params.yaml: those shared by all variants, its model's, its own.

    Raises:
        UserError: params.yaml is missing or malformed, or names no such variant.
    """
    return [override for line in _lines(params, name).values() for override in line]


def _lines(params: Path, name: str) -> dict[str, list[str]]:
    """The overrides that are shared, the model's, and the variant's own, each by its place in params.yaml."""
    content = read_params(params)
    variants: dict[str, Any] = content["variants"]
    if name not in variants:
        hint = nearest(name, list(variants))
        raise UserError(f"variant={name}: {params.name} names {', '.join(variants)}{hint}")
    model = model_of(name)
    of_model = {f"{MODELS}.{model}": content[MODELS][model]} if model else {}
    places = {SHARED_LINE: content.get("shared"), **of_model, place_of(name): variants[name]}
    return {where: split(line, f"{params.name}: {where}") for where, line in places.items()}


def place_of(name: str) -> str:
    """Where params.yaml has the line of a variant."""
    return BASELINE_LINE if is_baseline_name(name) else f"variants.{own_name(name)}"


def compose_values(conf: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """conf/ with overrides, as plain values."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        return plain(compose("config", overrides=list(overrides)))


def freeze(root: Path, name: str) -> Path:
    """Compose and validate a variant and write `variants/<name>.yaml`.

    Raises:
        UserError: see `frozen_variant`.
    """
    return write_frozen(root, name, frozen_variant(root, name))


def frozen_variant(root: Path, name: str) -> dict[str, Any]:
    """The whole configuration of a variant of params.yaml, as plain values.

    Raises:
        UserError: its line does not give a valid configuration, or contradicts what it shares with the other variants.
    """
    conf, lines = root / "conf", _lines(root / "params.yaml", name)
    overrides = [override for line in lines.values() for override in line]
    values = compose_values(conf, overrides)
    config = parse(values)
    if (config.method.name == BASELINE) != is_baseline_name(name):
        raise UserError(f"variant={name}: method={config.method.name} is only for the variant called {BASELINE}")
    if not is_baseline_name(name):
        of_float = _lines(root / "params.yaml", baseline_of(name))
        refuse_contradictions(config, lines, of_float, lambda own: parse(compose_values(conf, own)))
    refuse_source(config, "the pipeline")
    refuse_what_the_model_does_not_take(config, root)
    values["serve"] = {**values["serve"], "max_model_len": config.serve.length}
    values["frozen"] = {"variant": name, "overrides": shlex.join(overrides), "backends": backends_of(config)}
    values["frozen"]["locks"] = locks_of(values["frozen"]["backends"], root)
    return values


def write_frozen(root: Path, name: str, values: Mapping[str, Any]) -> Path:
    """Write a variant's composed configuration as `variants/<name>.yaml`, which Hydra reads without composing again."""
    import yaml

    document = {"defaults": _DEFAULTS, "hydra": _HYDRA, **values}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1000)
    path = frozen_path(root, name)
    with replaced(path) as temporary:
        temporary.write_text(_HEADER.format(name=name) + text, encoding="utf-8")
    return path


def read_frozen(path: Path) -> dict[str, Any]:
    """The configuration in a file that `write_frozen` wrote, as plain values.

    Raises:
        UserError: it is missing, or is not such a file.
    """
    values = read_yaml(path, "`dvc repro` makes it")
    frozen = values.get("frozen") if isinstance(values, dict) else None
    if not isinstance(frozen, dict) or not isinstance(frozen.get("overrides"), str):
        raise UserError(f"{path}: is not a frozen configuration; remove it and run `dvc repro`")
    return {str(key): value for key, value in values.items() if key not in ("defaults", "hydra")}
