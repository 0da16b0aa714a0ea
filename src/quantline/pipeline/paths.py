"""Results on disk: one JSON file per stage, read by later stages and by `publish`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.pipeline.config import Config
from quantline.pipeline.stages import STAGES


def read_result(path: Path) -> dict[str, Any]:
    """Read a stage's result.

    Raises:
        UserError: it is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the stage again") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it and run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a result; remove it and run the stage again")
    return value


SHARED = "shared"
# Below a report's folder: its content in a form that programs read.
REPORT_MANIFEST = "data/manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
# Options that change how a stage runs on this machine, but not its output.
_RUNTIME = (
    "device",
    "toolchains",
    "tracking",
    "promote",
    "serve.process",
    "variant",
    "hydra",
    "noise",
    "speed",
    "report",
)


@dataclass(frozen=True)
class StagePaths:
    """Paths of one stage of one variant."""

    output: Path

    @property
    def result(self) -> Path:
        """The stage's result, JSON."""
        return self.output.with_name(self.output.name + ".json")

    @property
    def log(self) -> Path:
        """Output of its worker or server."""
        return self.output.with_name(self.output.name + ".log")


def stage_paths(home: Path, variant: str, stage: str) -> StagePaths:
    """Paths of a stage below `home` (artifacts/ or scratch/); all variants share one download."""
    return StagePaths(home / (SHARED if stage in STAGES and STAGES[stage].shared else variant) / stage)


def checked_name(name: str) -> str:
    """Return `name` if it is valid as the name of a folder.

    Raises:
        UserError: it is empty, too long, or has characters other than letters, digits, '_' and '-' (DVC splits at a dot).
    """
    if not _NAME.fullmatch(name) or name == SHARED:
        raise UserError(
            f"variant={name!r}: a variant's name takes letters, digits, '_' and '-', 80 at most, and is not {SHARED!r}"
        )
    return name


def derived_name(config: Config, overrides: Sequence[str]) -> str:
    """The name of a variant that is run manually: method, bits, group size, and all other overrides."""
    group = "channel" if config.group_size == -1 else f"g{config.group_size}"
    base = BASELINE if config.method.name == BASELINE else f"{config.method.name}-w{config.bits}-{group}"
    rest = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in ("method", "bits", "group_size") or key.startswith(_RUNTIME):
            continue
        rest.append(re.sub(r"[^A-Za-z0-9_-]+", "_", f"{key.removeprefix('method.')}-{value}").strip("_"))
    name = "-".join([base, *sorted(rest)])
    if len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name
