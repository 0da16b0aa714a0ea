"""What a model does not take, found from its config.json before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_config import dimensions, read_config
from quantline.config.context import model_faults
from quantline.core.errors import ConfigError
from quantline.pipeline.config import Config
from quantline.pipeline.own_files import located
from quantline.quantization.capabilities import CALIBRATED


def positions_of(folder: Path) -> int | None:
    """The most tokens that a model takes; None if its config.json does not say."""
    return dimensions(read_config(folder)).positions


def faults_with_model(config: Config, model: Mapping[str, Any]) -> list[str]:
    """Options that need more tokens than a model takes. model: its config.json."""
    return model_faults(config, dimensions(model).positions, calibrated=config.method.name in CALIBRATED)


def refuse_what_does_not_fit(config: Config, folder: Path) -> None:
    """Refuse options that need more tokens than the model in a folder takes.

    Raises:
        ConfigError: every such option.
    """
    if faults := faults_with_model(config, read_config(folder)):
        raise ConfigError(faults)


def refuse_what_the_model_does_not_take(config: Config, root: Path) -> None:
    """The same before the download, for a model in a folder; that of the hub is not here yet, so its download refuses.

    Raises:
        ConfigError: every such option.
    """
    folder = located(root, config.model.path) if config.model.path else None
    if folder is not None and (folder / "config.json").is_file():
        refuse_what_does_not_fit(config, folder)
