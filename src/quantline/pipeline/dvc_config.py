"""What DVC's configuration says of a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantline.core.errors import UserError


def cache_folder(root: Path) -> Path:
    """The folder of this checkout's DVC cache, by DVC's configuration.

    Raises:
        UserError: the folder is not a DVC project, or its configuration cannot be read.
    """
    chosen = dvc_config(root)["cache"].get("dir")
    return Path(chosen) if chosen else root / ".dvc" / "cache"


def dvc_config(root: Path) -> Any:
    """DVC's configuration of this checkout, section -> option -> value.

    Raises:
        UserError: the folder is not a DVC project, or its configuration cannot be read.
    """
    from dvc.config import Config, ConfigError  # only its configuration: running dvc takes a second

    own = root / ".dvc"
    if not own.is_dir():
        raise UserError(f"{root}: is not a checkout with .dvc; clone the repository")
    try:
        return Config(str(own))
    except ConfigError as error:
        raise UserError(f"{own}/config: DVC cannot read it: {error}") from error
