"""What a model does not take, found from its config.json before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_config import dimensions, read_config
from quantline.config.context import fitting, model_faults
from quantline.core.errors import ConfigError, UserError
from quantline.pipeline.config import Config
from quantline.pipeline.own_files import located
from quantline.pipeline.stages import is_baseline


def positions_of(folder: Path) -> int | None:
    """The most tokens that a model takes; None if its config.json does not say."""
    return dimensions(read_config(folder)).positions


def faults_with_model(config: Config, model: Mapping[str, Any]) -> list[str]:
    """Options that need more tokens than a model takes. model: its config.json."""
    return model_faults(config, dimensions(model).positions, calibrated=not is_baseline(config))


def remedy_with_model(config: Config, model: Mapping[str, Any]) -> str:
    """What mends the faults of `faults_with_model` all at once, ready to paste; empty if there are none."""
    given = fitting(config, dimensions(model).positions, calibrated=not is_baseline(config))
    return f"all that it takes: {' '.join(given)}" if given else ""


def refuse_what_does_not_fit(config: Config, folder: Path) -> None:
    """Refuse options that need more tokens than the model in a folder takes.

    Raises:
        ConfigError: every such option.
    """
    _refuse(config, read_config(folder))


def _refuse(config: Config, model: Mapping[str, Any]) -> None:
    if faults := faults_with_model(config, model):
        raise ConfigError(faults, remedy_with_model(config, model))


def refuse_what_the_model_does_not_take(config: Config, root: Path, downloaded: Path | None = None) -> None:
    """The same before the download, for a model in a folder; that of the hub is not here yet, so its download refuses.

    downloaded: a folder of the model of the hub, for stages after the download.

    Raises:
        ConfigError: every such option.
    """
    folder = located(root, config.model.path) if config.model.path else downloaded
    if folder is not None and (folder / "config.json").is_file():
        try:
            model = read_config(folder)
        except UserError:
            return  # download refuses it, in the words of the folder that was given
        _refuse(config, model)
