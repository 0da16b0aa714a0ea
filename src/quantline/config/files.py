"""What the files of conf/ say: the groups with their choices, the values, and the comment of each option.

`--help`, completion and the reference of all options are made from it. Hydra is not needed: it takes longer to start than
all of this takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Lines = tuple[str, ...]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(path: Path) -> dict[str, Any]:
    """The values of one file, interpolations as they are written."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}  # noqa: S506 (a safe loader)


def groups(conf: Path) -> dict[str, str]:
    """The groups of conf/ in their order, each with its default choice."""
    named = [entry for entry in load(conf / "config.yaml")["defaults"] if isinstance(entry, dict)]
    return {key: value for entry in named for key, value in entry.items() if not key.startswith("override ")}


def choices_of(conf: Path, arguments: Iterable[str]) -> dict[str, str]:
    """The choice of every group that a command line makes; the default one where it makes none that exists."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    found = {}
    for group, default in groups(conf).items():
        choice = given.get(group, default)
        found[group] = choice if (conf / group / f"{choice}.yaml").is_file() else default
    return found


def section_of(conf: Path, group: str) -> str:
    """The section of the configuration that a group writes to."""
    path = next(iter(sorted((conf / group).glob("*.yaml"))))
    head = path.read_text(encoding="utf-8").splitlines()[0]
    return head.removeprefix("# @package").strip() if head.startswith("# @package") else group


def files_of(conf: Path, group: str, default: str) -> list[Path]:
    """The choices of a group, the default one first."""
    return sorted((conf / group).glob("*.yaml"), key=lambda path: (path.stem != default, path.stem))


@cache
def chosen(conf: Path, group: str, choice: str) -> dict[str, Any]:
    """One file of a group, on top of those that its own `defaults` name."""
    own = load(conf / group / f"{choice}.yaml")
    values: dict[str, Any] = {}
    for name in own.pop("defaults", []):
        if name != "_self_":
            values = _merged(values, chosen(conf, group, name))
    return _merged(values, own)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = _merged(values[key], value) if both else value
    return values


def flat(values: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The single values below a mapping, by place."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flat(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, values


def texts(conf: Path, group: str, default: str) -> dict[str, Lines]:
    """What the files of a group say of its options, by place; the default choice has the first word."""
    found: dict[str, Lines] = {}
    for path in files_of(conf, group, default):
        for place, text in comments(path)[1].items():
            found.setdefault(f"{section_of(conf, group)}.{place}", text)
    return found


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return '"' + value.replace("\n", "\\n") + '"' if isinstance(value, str) and not value.strip() else str(value)


@cache
def comments(path: Path) -> tuple[Lines, dict[str, Lines]]:
    """What a YAML file says of itself in its first lines, and of each key, by the key's place: `smoke.max_tokens`."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    ends: dict[int, int] = {}
    for token in yaml.scan(text, Loader=_Loader):
        if token.end_mark.line == token.start_mark.line and token.end_mark.column > token.start_mark.column:
            ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
    keys = list(_keys(yaml.compose(text, Loader=_Loader), ""))
    first = min((line for _, line, _ in keys), default=len(lines))
    head = [line for line in lines[:first] if line.startswith("#") and not line.startswith("# @package")]
    blank = next((number for number in range(first - 1, -1, -1) if not lines[number].strip()), None)
    if blank is not None:  # a block right above the first key belongs to that key
        head = [line for line in lines[:blank] if line.startswith("#") and not line.startswith("# @package")]
    said: dict[str, Lines] = {}
    for place, line, column in keys:
        after = lines[line][ends.get(line, 0) :].strip()
        found = []
        if after.startswith("#") and line not in {other for name, other, _ in keys if name == place.rpartition(".")[0]}:
            found.append(after)
            at = lines[line].index("#", ends.get(line, 0))
            found += _following(lines, line + 1, at)
        above = _above(lines, line, column) if line != first or blank is not None else []
        told = _bare([*above, *([""] if above and found else []), *found])
        if told:
            said[place] = told
    return _bare(head), said


def _bare(lines: Iterable[str]) -> Lines:
    return tuple(line.lstrip("#").removeprefix(" ").rstrip() for line in lines)


def _keys(node: yaml.Node | None, place: str) -> Iterator[tuple[str, int, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{place}.{key.value}" if place else str(key.value)
            yield name, key.start_mark.line, key.start_mark.column
            yield from _keys(value, name)


def _following(lines: list[str], start: int, column: int) -> list[str]:
    """Comment lines that go on where one began, in the same column."""
    found = []
    for line in lines[start:]:
        if not (line.strip().startswith("#") and line.index("#") == column and column > 0):
            break
        found.append(line.strip())
    return found


def _above(lines: list[str], line: int, column: int) -> list[str]:
    """Comment lines right above a key, beginning in its column."""
    found: list[str] = []
    for text in reversed(lines[:line]):
        if not (text.strip().startswith("#") and text.index("#") == column):
            break
        found.insert(0, text.strip())
    return found
