"""What all variants share: a variant's line in params.yaml that contradicts it is refused, with both lines as typed.

Shared stages run once, from the baseline's configuration, so a variant's own value of an option that they read would
have no effect. Where a stage compares a variant with the float model, both must have been asked the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quantline.core.errors import ConfigError
from quantline.core.text import as_configured
from quantline.pipeline.config import Config
from quantline.pipeline.overrides import key_of, typed
from quantline.pipeline.stages import STAGES, Stage, of_config

# Places in params.yaml.
SHARED_LINE = "shared"
BASELINE_LINE = "baseline"
Lines = Mapping[str, Sequence[str]]


def refuse_contradictions(
    config: Config, lines: Lines, of_float: Lines, composed: Callable[[Sequence[str]], Config]
) -> None:
    """Refuse a variant that contradicts what it shares with the float baseline.

    Args:
        config: the variant's.
        lines: the overrides that make it, by their place in params.yaml, the shared ones first.
        of_float: those that make the baseline.
        composed: the configuration of some overrides.

    Raises:
        ConfigError: every contradiction, with both lines as typed.
    """
    baseline = composed(_all(of_float))
    own_place, own = list(lines.items())[-1]
    faults: dict[str, str] = {}
    following: list[str] = []  # of options that nobody gave: their defaults follow others
    for stage, key in _shared_keys(config):
        for leaf, value, of_baseline in _differing(config, baseline, key):
            here, there = _said(lines, leaf, value), _said(of_float, leaf, of_baseline)
            fault = f"{here} contradicts {there}; {_why(stage)}"
            if typed(_all(lines), leaf) or typed(_all(of_float), leaf):
                faults.setdefault(here.partition(" (so")[0], fault)
            else:
                following.append(fault)
    # A group that is chosen here while its options are set in `shared`: those would win, and the choice be ignored.
    for override in own:
        group = key_of(override)
        place, hidden = next(
            ((where, found) for where, line in lines.items() if where != own_place
             if (found := [other for other in line if key_of(other).startswith(f"{group}.")])), ("", []),
        )  # fmt: skip
        stages = [stage for stage, key in _shared_keys(config) if stage.shared and key == group]
        if hidden and stages and override not in lines[place]:
            here = f"{own_place}: {override}"
            faults.setdefault(here, f"{here} contradicts {place}: {' '.join(hidden)}; {_why(stages[0])}")
    if faults or following:
        raise ConfigError(list(faults.values()) or following)


def _all(lines: Lines) -> list[str]:
    return [override for line in lines.values() for override in line]


def _shared_keys(config: Config) -> Iterator[tuple[Stage, str]]:
    for name in of_config(config):
        stage = STAGES[name]
        asked = name != "tasks" or config.tasks.any  # a variant may skip the tasks
        for key in stage.reads if stage.shared else stage.beside_float if asked else ():
            yield stage, key


_NOTHING = object()


def _differing(config: Config, baseline: Config, key: str) -> Iterator[tuple[str, Any, Any]]:
    """The options below `key` in which a variant differs: name, its value, the baseline's."""
    own, shared = _leaves(key, _value(config, key)), _leaves(key, _value(baseline, key))
    # A variant may ask for a part of what the baseline was asked: an option that only the baseline has is none of its own.
    for leaf, mine in own.items():
        theirs = shared.get(leaf, _NOTHING)
        part = isinstance(mine, list) and isinstance(theirs, list) and set(mine) <= set(theirs)
        left_out = mine is None and any(other.startswith(f"{leaf}.") for other in shared)
        if not part and not left_out and mine != theirs:
            yield leaf, mine, theirs


def _value(config: Config, key: str) -> Any:
    value: Any = config.model_dump()
    for part in key.split("."):
        value = value[part]
    return value


def _leaves(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {name: leaf for part, inner in value.items() for name, leaf in _leaves(f"{key}.{part}", inner).items()}
    return {} if value == {} else {key: value}


def _said(lines: Lines, leaf: str, value: Any) -> str:
    """Where and how an option got its value, as it was typed."""
    if value is _NOTHING:
        return "the float baseline, which has no such"
    found = typed(_all(lines), leaf)
    if found is None:
        return f"the default {leaf}={as_configured(value)}"
    where = next(where for where, line in reversed([*lines.items()]) if found in line)
    return f"{where}: {found}" + ("" if key_of(found) == leaf else f" (so {leaf}={as_configured(value)})")


def _why(stage: Stage) -> str:
    if stage.shared:
        return (
            f"{stage.name} runs once for all variants of a model. Write it in `{SHARED_LINE}:`, or name the other model in "
            "`models:` (docs/guide/models.md)"
        )
    return f"{stage.name} compares the variant with the float model on the same. Write it in `{SHARED_LINE}:`"
