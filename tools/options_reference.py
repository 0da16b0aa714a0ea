"""Write the reference of every option, as `make docs` does:

PYTHONPATH=src python tools/options_reference.py docs/reference/options.md

Names, types and limits come from the pydantic sections, defaults and choices from conf/ as Hydra composes it, the text from
the comments of the YAML files. The page is kept in git; a test holds that it is what this script writes.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quantline.pipeline.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
# `compose` writes this section when it freezes a variant; nobody sets it.
NOT_OPTIONS = ("frozen",)
INTRO = """# Every option

An option is set by `name=value` on the command line of a stage, or in a line of `params.yaml`:

```sh
python -m stages.quantize method=gptq bits=8 calibration.n_samples=64
```

A *group* is a folder of `conf/`: `group=choice` takes that file's values as they are, and single options go on top of it.
`python -m stages.quantize --help` prints the same groups, `--cfg job` the composed result.

This page is made from `conf/` and the types of `quantline` by `tools/options_reference.py`, so it is not edited by hand.
"""


@dataclass
class Option:
    """A row of the reference."""

    name: str
    value: str
    default: str
    text: Lines = ()


@dataclass
class Part:
    """Options that stand in one table, under a heading of their own where they have one."""

    title: str
    text: Lines = ()
    options: list[Option] = field(default_factory=list)


# --- comments of YAML files


Lines = tuple[str, ...]


@cache
def comments(path: Path) -> tuple[Lines, dict[str, Lines]]:
    """What a YAML file says of itself in its first lines, and of each key, by the key's place: `smoke.max_tokens`."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    ends: dict[int, int] = {}
    for token in yaml.scan(text):
        if token.end_mark.line == token.start_mark.line and token.end_mark.column > token.start_mark.column:
            ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
    keys = list(_keys(yaml.compose(text), ""))
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


# --- types


def _plain(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    annotation = _plain(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(annotation: Any) -> str:
    named = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    found = []
    for member in _members(annotation):
        origin = get_origin(member)
        if origin is Literal:
            values = [f"`{_shown(value)}`" for value in get_args(member)]
            found.append(values[0] if len(values) == 1 else f"one of {', '.join(values)}")
        elif origin is list:
            found.append(f"list of {_kind(get_args(member)[0])}")
        elif origin is dict:
            found.append(f"mapping to {_kind(get_args(member)[1])}")
        elif _section(member):
            found.append("options")
        else:
            found.append(named.get(member, str(member)))
    return " or ".join(dict.fromkeys(found))


def _limits(info: FieldInfo) -> list[str]:
    found = []
    for limit in info.metadata:
        for key, text in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            if (value := getattr(limit, key, None)) is not None:
                found.append(f"{text} {value}")
        if (count := getattr(limit, "min_length", None)) is not None:
            found.append("not empty" if count == 1 else f"at least {count} entries")
        if (pattern := getattr(limit, "pattern", None)) is not None:
            found.append(f"matches `{pattern}`")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return '"' + value.replace("\n", "\\n") + '"' if isinstance(value, str) and not value.strip() else str(value)


# --- options


def options(section: type[BaseModel], place: str, values: Any, said: Mapping[str, Lines]) -> Iterator[Option | Part]:
    """Options of a section at a place of the configuration, then those of the sections in it."""
    later: list[Option | Part] = []
    for key, info in section.model_fields.items():
        name = info.alias or key
        full = f"{place}.{name}" if place else name
        given = isinstance(values, Mapping) and name in values
        default = values[name] if given else None if info.is_required() else info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            default = default.model_dump(by_alias=True)
        members = _members(info.annotation)
        inner = [member for member in members if _section(member)]
        if inner and type(None) not in members:
            later.append(Part(full, said.get(full) or _first(inner[0].__doc__)))
            later += options(inner[0], full, default, said)
            continue
        required = not given and info.is_required()
        told = (info.description,) if info.description else ()  # where conf/ has no line for it
        yield Option(full, _value(info), "required" if required else f"`{_shown(default)}`", said.get(full) or told)
        for entry in inner:
            later.append(Part(full, _first(entry.__doc__)))
            later += options(entry, full, default, said)
        for member in members:
            entry = _plain(get_args(member)[-1]) if get_origin(member) in (list, dict) else None
            if _section(entry):
                below = f"{full}[]" if get_origin(member) is list else f"{full}.NAME"
                later.append(Part(below, _first(entry.__doc__)))
                later += options(entry, below, None, said)
    yield from later


def _value(info: FieldInfo) -> str:
    members = [member for member in _members(info.annotation) if member is not type(None)]
    limits = _limits(info)
    told = ", ".join([" or ".join(dict.fromkeys(map(_kind, members))), *limits])
    null = len(members) < len(_members(info.annotation))
    return f"{told}{',' if limits else ''} or null" if null else told


def _first(doc: str | None) -> Lines:
    return (" ".join((doc or "").split("\n\n")[0].split()),)


def _prose(lines: Lines) -> str:
    """Comment lines as Markdown: those that are set in, a table usually, stay as they are."""
    found: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("  ") != inside:
            inside = not inside
            found += ["", "```text"] if inside else ["```", ""]
        found.append(line if inside else _escaped(line))
    return "\n".join([*found, "```"] if inside else found)


def _escaped(text: str) -> str:
    """Text whose stars and angle brackets mean themselves; what stands in backticks is left alone."""
    parts = text.split("`")
    return "`".join(
        part if number % 2 else part.replace("*", "\\*").replace("<", "&lt;") for number, part in enumerate(parts)
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"


def _cell(lines: Lines) -> str:
    return _escaped(" ".join(line.strip() for line in lines))


def _tables(rows: Iterable[Option | Part]) -> Iterator[str]:
    current = Part("")
    parts = [current]
    for row in rows:
        if isinstance(row, Part):
            current = row
            parts.append(current)
        else:
            current.options.append(row)
    for part in parts:
        if part.title:
            yield f"### `{part.title}`\n"
            yield f"{_prose(part.text)}\n"
        if part.options:
            yield "| option | default | value | what it is |\n| --- | --- | --- | --- |"
            yield from (_row(f"`{one.name}`", one.default, one.value, _cell(one.text)) for one in part.options)
            yield ""


# --- the page


def composed() -> dict[str, Any]:
    """conf/ as Hydra composes it by default, interpolations left as they are written."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return _container(compose("config"))


@cache
def chosen(group: str, choice: str) -> dict[str, Any]:
    """One file of a group, on top of those that its own `defaults` name."""
    own = OmegaConf.load(CONF / group / f"{choice}.yaml")
    below = [chosen(group, name) for name in own.pop("defaults", []) if name != "_self_"]
    return _container(OmegaConf.merge(*below, own))


def _container(config: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def flat(values: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The single values below a mapping, by place."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flat(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, values


def groups() -> dict[str, str]:
    """The groups of conf/ in their order, each with its default choice."""
    defaults = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    named = [entry for entry in defaults if isinstance(entry, dict)]
    return {key: value for entry in named for key, value in entry.items() if not key.startswith("override ")}


def section_of(group: str) -> str:
    """The section of the configuration that a group writes to."""
    path = next(iter(sorted((CONF / group).glob("*.yaml"))))
    head = path.read_text(encoding="utf-8").splitlines()[0]
    return head.removeprefix("# @package").strip() if head.startswith("# @package") else group


def files_of(group: str, default: str) -> list[Path]:
    """The choices of a group, the default one first."""
    return sorted((CONF / group).glob("*.yaml"), key=lambda path: (path.stem != default, path.stem))


def choices(group: str, default: str) -> Iterator[str]:
    """A table of a group's files: what each is for, and where it differs from the default one."""
    before = dict(flat(chosen(group, default)))
    yield "| choice | what it is | differs from the default by |\n| --- | --- | --- |"
    for path in files_of(group, default):
        own = dict(flat(chosen(group, path.stem)))
        changed = {
            key: value for key, value in own.items() if key != "name" and (key not in before or before[key] != value)
        }
        name = f"`{group}={path.stem}`" + (" (default)" if path.stem == default else "")
        told = "" if group == "method" else ", ".join(f"`{key}={_shown(value)}`" for key, value in changed.items())
        yield _row(name, _cell(comments(path)[0]), told)
    yield ""


def texts(group: str, default: str) -> dict[str, Lines]:
    """What the files of a group say of its options; the default choice has the first word."""
    found: dict[str, Lines] = {}
    for path in files_of(group, default):
        for place, text in comments(path)[1].items():
            found.setdefault(f"{section_of(group)}.{place}", text)
    return found


def backends() -> Iterator[str]:
    """The table of what each backend takes, of capabilities.yaml."""
    path = next((ROOT / "src").rglob("capabilities.yaml"))
    yield "## What each backend takes\n"
    yield (
        f"From `{path.relative_to(ROOT)}`, which also lists the families of models. *Rules* are `layers.rules`: `skip` "
        "leaves linears in float, `widths` also gives them other bits and group sizes.\n"
    )
    yield "| method | backend | `bits` | `group_size` | rules | `lm_head` | `dtype` | goes on after a crash |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    rows = []
    for backend, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for method, own in entry["methods"].items():
            able = {**entry, **own}
            sizes = able.get("group_size")
            rows.append((
                f"`{method}`", f"`{backend}`", ", ".join(map(str, able["bits"])),
                ", ".join(map(str, sizes)) if sizes else "-1, or any that divides the inputs", able["layers"],
                "yes" if able["lm_head"] else "no", ", ".join(able["dtypes"]), "yes" if able["resume"] else "no",
            ))  # fmt: skip
    yield from ("| " + " | ".join(row) + " |" for row in sorted(rows))
    yield ""


def page() -> str:
    """The whole page."""
    return "\n".join(_page()).rstrip() + "\n"


def _page() -> Iterator[str]:
    base, known = composed(), groups()
    writers: dict[str, list[str]] = {}
    for group in known:
        writers.setdefault(section_of(group), []).append(group)
    root_texts = comments(CONF / "config.yaml")[1]
    fields = {name: info for name, info in Config.model_fields.items() if name not in NOT_OPTIONS}
    single = [name for name in fields if name not in writers and not _section(_plain(fields[name].annotation))]
    yield INTRO
    yield "## The variant\n"
    everything = list(options(Config, "", base, root_texts))
    yield from _tables([row for row in everything if isinstance(row, Option) and row.name in single])
    for name, info in fields.items():
        if name in single:
            continue
        said = {**root_texts}
        yield f"## `{name}`\n"
        for group in writers.get(name, []):
            said.update(texts(group, known[group]))
            if len(writers[name]) > 1:
                yield f"The group `{group}`:\n"
            yield from choices(group, known[group])
        classes = [member for member in _members(info.annotation) if _section(member)]
        if len(classes) == 1:
            yield from _tables(options(classes[0], name, base.get(name), said))
            continue
        for one in classes:  # which class it is, `name` tells
            (tag,) = get_args(one.model_fields["name"].annotation)
            own = {f"{name}.{key}": text for key, text in comments(CONF / name / f"{tag}.yaml")[1].items()}
            rows = [row for row in options(one, name, chosen(name, tag), own) if row.name != f"{name}.name"]
            if rows:
                yield from _tables([Part(f"{name}={tag}", _first(one.__doc__)), *rows])
    yield from backends()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
