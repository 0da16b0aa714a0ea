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
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from quantline.config import files
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
    text: files.Lines = ()


@dataclass
class Part:
    """Options that stand in one table, under a heading of their own where they have one."""

    title: str
    text: files.Lines = ()
    options: list[Option] = field(default_factory=list)


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
            values = [f"`{files.shown(value)}`" for value in get_args(member)]
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


# --- options


def options(
    section: type[BaseModel], place: str, values: Any, said: Mapping[str, files.Lines]
) -> Iterator[Option | Part]:
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
        yield Option(
            full, _value(info), "required" if required else f"`{files.shown(default)}`", said.get(full) or told
        )
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


def _first(doc: str | None) -> files.Lines:
    return (" ".join((doc or "").split("\n\n")[0].split()),)


def _prose(lines: files.Lines) -> str:
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


def _cell(lines: files.Lines) -> str:
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


def _container(config: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def choices(group: str, default: str) -> Iterator[str]:
    """A table of a group's files: what each is for, and where it differs from the default one."""
    before = dict(files.flat(files.chosen(CONF, group, default)))
    yield "| choice | what it is | differs from the default by |\n| --- | --- | --- |"
    for path in files.files_of(CONF, group, default):
        own = dict(files.flat(files.chosen(CONF, group, path.stem)))
        changed = {
            key: value for key, value in own.items() if key != "name" and (key not in before or before[key] != value)
        }
        name = f"`{group}={path.stem}`" + (" (default)" if path.stem == default else "")
        told = "" if group == "method" else ", ".join(f"`{key}={files.shown(value)}`" for key, value in changed.items())
        yield _row(name, _cell(files.comments(path)[0]), told)
    yield ""


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
    base, known = composed(), files.groups(CONF)
    writers: dict[str, list[str]] = {}
    for group in known:
        writers.setdefault(files.section_of(CONF, group), []).append(group)
    root_texts = files.comments(CONF / "config.yaml")[1]
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
            said.update(files.texts(CONF, group, known[group]))
            if len(writers[name]) > 1:
                yield f"The group `{group}`:\n"
            yield from choices(group, known[group])
        classes = [member for member in _members(info.annotation) if _section(member)]
        if len(classes) == 1:
            yield from _tables(options(classes[0], name, base.get(name), said))
            continue
        for one in classes:  # which class it is, `name` tells
            (tag,) = get_args(one.model_fields["name"].annotation)
            own = {f"{name}.{key}": text for key, text in files.comments(CONF / name / f"{tag}.yaml")[1].items()}
            rows = [row for row in options(one, name, files.chosen(CONF, name, tag), own) if row.name != f"{name}.name"]
            if rows:
                yield from _tables([Part(f"{name}={tag}", _first(one.__doc__)), *rows])
    yield from backends()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
