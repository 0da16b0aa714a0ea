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


# AutoAWQ's first words for keys of today.
_FIRST_WORDS = {"w_bit": "bits", "q_group_size": "group_size"}


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A section in today's words; one that has both keeps today's."""
    old = {key: _FIRST_WORDS[key] for key in config if key in _FIRST_WORDS and _FIRST_WORDS[key] not in config}
    return {old.get(key, key): value for key, value in config.items()}


def stored_bits_and_groups(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Bits and group size as they are in a section, under today's names or those of AutoAWQ's first sections."""
    own = renamed(config)
    return own.get("bits"), own.get("group_size")


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


def flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A truth value; one that is missing or null is the default.

    Raises:
        CheckpointError: it is another value.
    """
    value = default if config.get(key) is None else config[key]
    if type(value) is not bool:
        raise CheckpointError(f"{path}: {key} is {value!r}: it must be true or false")
    return value


def names(path: Path, config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names; one that is missing or null is empty.

    Raises:
        CheckpointError: it is another value.
    """
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path}: {key} is {value!r}: it must be a list of names")
    return tuple(value)


# GPTQModel's keys of a rule about how the weights are found and computed, not about how they are stored.
_MAKING = frozenset(
    {
        "mse", "damp_percent", "damp_auto_increment", "act_group_aware", "static_groups", "true_sequential", "gptaq",
        "gptaq_alpha", "gptaq_memory_device", "foem", "hessian", "fallback", "failsafe", "smooth", "smoother",
        "calibration", "mock_quantization", "v2", "v2_alpha", "v2_memory_device", "meta", "device", "desc_act",
    }
)  # fmt: skip


def patterns(path: Path, config: Mapping[str, Any], main: LayerSettings) -> tuple[tuple[str, LayerSettings], ...]:
    """GPTQModel's `dynamic`. Negative patterns are skipped: the tensors show which modules are in float.

    Keys about the making of the weights are passed over; those about the order of columns, too, which the tensors show.

    Raises:
        CheckpointError: patterns or settings are invalid, or a key gives some linears another format.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{path}: dynamic is not a JSON object: restore the file")
    found = []
    for key, own in dynamic.items():
        if str(key).startswith("-:"):
            continue
        known = {"bits": main.bits, "group_size": main.group_size, "sym": main.symmetric}
        if not isinstance(own, dict):
            raise CheckpointError(f"{path}: dynamic {key!r} is {own!r}: it must be a JSON object")
        # A key that says the same as the whole section changes nothing.
        alien = [name for name in own if name not in known and name not in _MAKING and own[name] != config.get(name)]
        if alien:
            raise CheckpointError(
                f"{path}: dynamic {key!r} sets {alien[0]} to {own[alien[0]]!r}: linears may differ in bits, group_size "
                "and sym; quantize these with the settings of the others"
            )
        values = {**known, **{name: own[name] for name in known if own.get(name) is not None}}
        bits, size = values["bits"], values["group_size"]
        if type(bits) is not int or bits not in BITS or type(size) is not int or size < -1 or size == 0:
            raise CheckpointError(
                f"{path}: dynamic {key!r} sets {own!r}: bits must be 2, 3, 4 or 8, group_size -1 or positive"
            )
        symmetric = flag(Path(f"{path}: dynamic {key!r}"), values, "sym", main.symmetric)
        try:
            re.compile(str(key).removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(
                f"{path}: dynamic {key!r} is not a regular expression ({error}): correct it"
            ) from error
        settings = LayerSettings(bits, size, symmetric)
        found.append((str(key).removeprefix("+:"), settings))
    return tuple(found)
