"""Values that the config sections of several layouts share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.checkpoints.layouts.packing import BITS
from quantline.core.errors import CheckpointError


def one_of(path: Path, method: str, version: object, known: Mapping[str, str]) -> str:
    """The layout of a version.

    Raises:
        CheckpointError: the version is unknown.
    """
    layout = known.get(str(version).lower())
    if layout is None:
        raise CheckpointError(
            f"{path}: {method} stored as {version!r}: supported are {', '.join(known)}; convert it first"
        )
    return layout


def stored_bits_and_groups(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Bits and group size as they are in a section, under today's names or those of AutoAWQ's first sections."""
    return config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))


def bits_and_groups(path: Path, method: str, config: Mapping[str, Any], held: Collection[int]) -> tuple[int, int]:
    """Bits and group size.

    Raises:
        CheckpointError: they are invalid, or the layout does not support them.
    """
    bits, group_size = stored_bits_and_groups(config)
    if type(bits) is not int or bits not in held:
        raise CheckpointError(f"{path}: bits is {bits!r}: {method} takes {' or '.join(map(str, held))}")
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise CheckpointError(f"{path}: group_size is {group_size!r}: it must be -1 or positive")
    return bits, group_size


def patterns(path: Path, dynamic: object, main: LayerSettings) -> tuple[tuple[str, LayerSettings], ...]:
    """GPTQModel's `dynamic`. Negative patterns are skipped: the tensors show which modules are in float.

    Raises:
        CheckpointError: patterns or settings are invalid.
    """
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{path}: dynamic is not a JSON object: restore the file")
    found = []
    for key, own in dynamic.items():
        if str(key).startswith("-:"):
            continue
        known = {"bits": main.bits, "group_size": main.group_size, "sym": main.symmetric}
        if not isinstance(own, dict) or set(own) - {*known, "desc_act"}:
            raise CheckpointError(f"{path}: dynamic {key!r} sets {own!r}: allowed are bits, group_size and sym")
        values = {**known, **own}
        if values["bits"] not in BITS or type(values["group_size"]) is not int:
            raise CheckpointError(
                f"{path}: dynamic {key!r} sets {own!r}: bits must be 2, 3, 4 or 8, group_size an integer"
            )
        try:
            re.compile(str(key).removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(
                f"{path}: dynamic {key!r} is not a regular expression ({error}): correct it"
            ) from error
        settings = LayerSettings(values["bits"], values["group_size"], bool(values["sym"]))
        found.append((str(key).removeprefix("+:"), settings))
    return tuple(found)
