"""The text of --help: what a command does, its own options, and the options of the configuration that it reads.

Hydra's own help prints the whole configuration for every command, 280 lines; `--help=all` still does.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.config import files
from quantline.pipeline.command_line import Option

# Wide enough for nearly all names with their values; a longer one has its text on the next line.
_NAMES = 38
_WIDTH = 110


def usage(
    command: str, about: str | None, options: Sequence[Option], *, reads: Sequence[str] | None, conf: Path,
    arguments: Sequence[str] = (),
) -> str:  # fmt: skip
    """What --help prints.

    Args:
        command: as it is typed, such as `python -m stages.quantize`.
        about: what it does; the module's docstring.
        options: its own.
        reads: the keys of the configuration that it reads; None for a command that takes no configuration.
        conf: the folder of configurations.
        arguments: of the command line. A choice among them, such as method=gptq, decides whose options are shown.
    """
    typed = command.partition(" ")[0]
    said = (about or "").strip()
    if typed == "quantline":  # the examples as they are typed with the console command
        said = said.replace("python -m stages.", "quantline ")
    lines = [said, "", f"usage: {command} [NAME=VALUE ...]"]
    if options:
        lines += ["", "Options of this command:"]
        lines += [line for option in options for line in _row(option.shown, option.told)]
    if reads is None:
        return "\n".join(lines)
    chosen = files.choices_of(conf, arguments)
    if reads:
        lines += ["", "Options of the configuration that it reads:"]
        lines += _read_by(reads, conf, chosen)
    tops = {key.partition(".")[0] for key in reads}
    rest = [f"{group}={choice}" for group, choice in chosen.items() if files.section_of(conf, group) not in tops]
    if len(tops) > 1:
        lines += ["", "Further groups, which other stages read:"]
        lines += textwrap.wrap(", ".join(rest), _width(), initial_indent="  ", subsequent_indent="  ")
    lines += [
        "", "--help=all prints every option, --cfg job the composed configuration, --version the version;",
        "docs/reference/options.md explains every option.",
    ]  # fmt: skip
    return "\n".join(lines)


def _width() -> int:
    return min(_WIDTH, max(60, shutil.get_terminal_size((100, 24)).columns))


def _row(name: str, text: str) -> Iterator[str]:
    name = textwrap.shorten(name, _width() - 2, placeholder=" ...") if len(name) > _width() - 2 else name
    parts = textwrap.wrap(text, _width() - _NAMES - 4) or [""]
    if len(name) > _NAMES:
        yield f"  {name}"
    else:
        yield f"  {name:<{_NAMES}}  {parts.pop(0)}".rstrip()
    yield from (" " * (_NAMES + 4) + part for part in parts if part)


def _read_by(reads: Sequence[str], conf: Path, chosen: Mapping[str, str]) -> Iterator[str]:
    root = files.load(conf / "config.yaml")
    root_texts = files.comments(conf / "config.yaml")[1]
    for top in dict.fromkeys(key.partition(".")[0] for key in reads):
        keys = [key for key in reads if key.partition(".")[0] == top]
        values: dict[str, Any] = dict(files.flat(root[top], top)) if top in root else {}
        texts = dict(root_texts)
        for group, choice in chosen.items():
            if files.section_of(conf, group) == top:
                others = [path.stem for path in files.files_of(conf, group, choice)][1:]
                if others:
                    yield from _row(f"{group}={choice}", f"or {', '.join(others)}")
                values.update(files.flat(files.chosen(conf, group, choice), top))
                texts.update(files.texts(conf, group, choice))
        for name, value in values.items():
            if name != f"{top}.name" and any(name == key or name.startswith(f"{key}.") for key in keys):
                said = " ".join(line.strip() for line in texts.get(name, ()))
                yield from _row(f"{name}={files.shown(value)}", said)
