"""Composes conf/ as Hydra does, once for each choice of groups, and parses each file once: that is most of the time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import yaml

from quantline.pipeline.compose import compose_values
from quantline.pipeline.hydra_values import plain

_load = yaml.load


class Composer:
    """Call it with overrides; `composed` in tests/conftest.py is one. A test compares it with Hydra's own `compose`."""

    def __init__(self, conf: Path) -> None:
        self.conf = conf
        self._chosen: dict[tuple[str, ...], Any] = {}
        self._parsed: dict[str, Any] = {}

    def __call__(self, *overrides: str) -> dict[str, Any]:
        """conf/ with overrides, as plain values.

        Raises:
            HydraException: as `compose` does.
        """
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.core.override_parser.types import OverrideType

        parsed = OverridesParser.create().parse_overrides(list(overrides))
        if any(one.type != OverrideType.CHANGE or one.is_sweep_override() or one.package for one in parsed):
            return compose_values(self.conf, overrides)
        groups = [
            one for one in parsed if (self.conf / one.key_or_group).is_dir() and not isinstance(one.value(), dict)
        ]
        config = copy.deepcopy(self._of_groups([str(one.input_line) for one in groups]))
        ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if one not in groups], config)
        return plain(config)

    def _of_groups(self, overrides: Sequence[str]) -> Any:
        from hydra import compose, initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        key = tuple(overrides)
        if key not in self._chosen:
            GlobalHydra.instance().clear()
            reading = patch.object(yaml, "load", self._parse)
            with reading, initialize_config_dir(config_dir=str(self.conf), version_base="1.3"):
                self._chosen[key] = compose("config", overrides=list(overrides))
        return self._chosen[key]

    def _parse(self, file: IO[str], Loader: Any) -> Any:
        """As `yaml.load`, for a file or a text."""
        text = file if isinstance(file, str) else file.read()
        if text not in self._parsed:
            self._parsed[text] = _load(text, Loader)
        return copy.deepcopy(self._parsed[text])
