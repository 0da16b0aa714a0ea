"""Freeze a variant: compose conf/ with its line in params.yaml, validate it, and write one file that DVC can depend on.

DVC's own Hydra mode recomposes only when params.yaml changes, not when conf/ does (docs/decisions/0001).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.core.files import replaced
from quantline.core.text import nearest
from quantline.pipeline.config import parse
from quantline.pipeline.hydra_values import plain
from quantline.pipeline.identity import backends_of, locks_of
from quantline.pipeline.paths import checked_name

_HEADER = "# Made by `python -m stages.compose variant={name}`; edit conf/ or params.yaml instead.\n"
_HYDRA = {"output_subdir": None, "run": {"dir": "."}, "sweep": {"dir": ".", "subdir": "."}}
_DEFAULTS = ["_self_", {"override hydra/job_logging": "stdout"}, {"override hydra/hydra_logging": "none"}]


def read_params(params: Path) -> dict[str, Any]:
    """The content of params.yaml: `shared`, `baseline`, and `variants` by name, with the baseline as the first of them.

    Raises:
        UserError: it is missing or malformed, or a name is not valid as the name of a folder.
    """
    import yaml

    try:
        content = yaml.safe_load(params.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{params.name}: {error.strerror}; this file names the variants to build") from error
    except yaml.YAMLError as error:
        raise UserError(f"{params.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise UserError(f"{params.name}: needs `variants:`, a mapping of names to overrides such as method=gptq bits=4")
    variants = {checked_name(str(key)): value for key, value in content["variants"].items()}
    if BASELINE in variants:
        raise UserError(f"{params.name}: a variant cannot be called {BASELINE}, the name of the baseline")
    return {**content, "variants": {BASELINE: content.get("baseline"), **variants}}


def variant_overrides(params: Path, name: str) -> list[str]:
    """The Hydra overrides of a variant of params.yaml, those shared by all variants first.

    Raises:
        UserError: params.yaml is missing or malformed, or names no such variant.
    """
    content = read_params(params)
    lines: dict[str, Any] = content["variants"]
    if name not in lines:
        hint = nearest(name, list(lines))
        raise UserError(f"variant={name}: {params.name} names {', '.join(lines)}{hint}")
    overrides = []
    for key, line in (("shared", content.get("shared")), (f"variants.{name}", lines[name])):
        if line is not None and not isinstance(line, str):
            raise UserError(f"{params.name}: {key} is {line!r}; give overrides as one line of text")
        try:
            overrides.extend(shlex.split(line or ""))
        except ValueError as error:
            raise UserError(f"{params.name}: {key} is {line!r}: {error}; quote it as in a shell") from error
    return overrides


def freeze(root: Path, name: str) -> Path:
    """Compose and validate a variant and write `variants/<name>.yaml`.

    Raises:
        UserError: its line does not give a valid configuration.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    checked_name(name)
    overrides = variant_overrides(root / "params.yaml", name)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        values = plain(compose("config", overrides=overrides))
    config = parse(values)
    if (config.method.name == BASELINE) != (name == BASELINE):
        raise UserError(f"variant={name}: method={config.method.name} is only for the variant called {BASELINE}")
    values["frozen"] = {"variant": name, "overrides": " ".join(overrides), "backends": backends_of(config)}
    values["frozen"]["locks"] = locks_of(values["frozen"]["backends"], root)
    return write_frozen(root, name, values)


def write_frozen(root: Path, name: str, values: Mapping[str, Any]) -> Path:
    """Write a variant's composed configuration as `variants/<name>.yaml`, which Hydra reads without composing again."""
    import yaml

    document = {"defaults": _DEFAULTS, "hydra": _HYDRA, **values}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1000)
    path = root / "variants" / f"{name}.yaml"
    with replaced(path) as temporary:
        temporary.write_text(_HEADER.format(name=name) + text, encoding="utf-8")
    return path
