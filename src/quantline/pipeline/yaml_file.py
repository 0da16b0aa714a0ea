"""Reads the YAML files that people edit, or that Quantline writes for Hydra: plain values, or one sentence."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from quantline.core.errors import UserError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps the last of two equal keys without a word."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, Hashable) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key} is given twice, in line {seen[key]} and in line {line}; keep one of them"
            )
        if isinstance(key, Hashable):
            seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path, about: str) -> Any:
    """The content of a YAML file as plain values.

    about: what the file does, for the message where it cannot be read.

    Raises:
        UserError: it is missing, is not UTF-8 or is not valid YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}; {about}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    try:
        return yaml.load(text, _Loader)  # noqa: S506
    except Exception as error:  # PyYAML's constructors of dates and numbers raise whatever Python raises
        shown = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path.name} is not valid YAML: {shown}") from error
