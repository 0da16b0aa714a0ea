"""Names and paths: the one source of where anything lies.

    artifacts/<variant>/<stage>/        what DVC keeps, for the variants of params.yaml
    scratch/<variant>/<stage>/          the same, for stages run by hand
    .../<stage>.json                    the stage's result
    .../<stage>.log                     what its worker or server printed
    variants/<variant>.yaml             the frozen configuration

The download is shared by every variant and lies under the name `download`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantline.config import Config
from quantline.errors import UserError

STAGES = ("download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks", "speed")
BASELINE = "float"
SHARED = "shared"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
# Options that change how a stage runs here but nothing that it makes.
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
    """Where one stage of one variant puts what it makes."""

    output: Path

    @property
    def result(self) -> Path:
        """The stage's result, JSON."""
        return self.output.with_name(self.output.name + ".json")

    @property
    def log(self) -> Path:
        """What its worker or server printed."""
        return self.output.with_name(self.output.name + ".log")


def stage_paths(home: Path, variant: str, stage: str) -> StagePaths:
    """Paths of a stage below `home` (artifacts/ or scratch/); the download has one place for all variants."""
    return StagePaths(home / (SHARED if stage == "download" else variant) / stage)


def checked_name(name: str) -> str:
    """Return `name` where it can be a folder's name.

    Raises:
        UserError: it is empty, too long, or holds anything but letters, digits, '_' and '-' (DVC reads a dot as a level).
    """
    if not _NAME.fullmatch(name) or name == SHARED:
        raise UserError(
            f"variant={name!r}: a variant's name takes letters, digits, '_' and '-', 80 at most, and is not {SHARED!r}"
        )
    return name


def derived_name(config: Config, overrides: Sequence[str]) -> str:
    """The name of a variant run by hand: method, bits, group size, and whatever else was overridden."""
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
