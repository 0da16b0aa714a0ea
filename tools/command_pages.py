"""Write a page for each command, as `make docs` does:

PYTHONPATH=src:. python tools/command_pages.py docs/reference/commands

What a command does and the examples come from the docstring of its module in stages/, its options from the module, and what
a stage follows and writes from the table of stages. The pages are kept in git; a test holds that they are what this writes.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantline.pipeline.command_line import Option
from quantline.pipeline.stages import PIPELINE, STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = "Examples:"
# The environments in which a stage runs, by the keys of `frozen.locks`.
_ENVIRONMENTS = {"quantizer": "the backend's", "server": "`vllm`", "tasks": "`lm_eval`"}
_CODES = (
    "Exit codes: 0 done, 1 failed, 2 something that you can correct, 130 interrupted; 75 MLflow could not be reached."
)


def commands() -> list[str]:
    """The names of the commands."""
    return sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py"))


def parts_of(name: str) -> tuple[str, list[str], list[str]]:
    """The first sentence of a command's docstring, its other paragraphs, and its examples as they are typed."""
    source = (ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8")
    about, _, examples = (ast.get_docstring(ast.parse(source)) or "").partition(f"\n{EXAMPLES}\n")
    first, *rest = re.split(r"\n{2,}", about.strip())
    return first, rest, [line.strip() for line in examples.splitlines() if line.strip()]


def options_of(name: str) -> Sequence[Option]:
    """The command's own options."""
    found: Sequence[Option] = getattr(importlib.import_module(f"stages.{name}"), "OPTIONS", ())
    return found


def reads_of(name: str) -> list[str] | None:
    """The sections of the configuration that a command reads; None if it takes no configuration."""
    source = (ROOT / "stages" / f"{name}.py").read_text(encoding="utf-8")
    if f'@stage("{name}")' in source:
        keys = [key for key in STAGES[name].reads if not key.startswith("frozen.")] if name in STAGES else []
        return list(dict.fromkeys(key.partition(".")[0] for key in keys))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "main":
            (value,) = [word.value for word in node.keywords if word.arg == "reads"] or [ast.Tuple([])]
            if isinstance(value, ast.Name):
                return [str(key) for key in getattr(importlib.import_module(f"stages.{name}"), value.id)]
            return [str(key) for key in ast.literal_eval(value)]
    return None


def page(name: str) -> str:
    """The page of a command."""
    return "\n".join(_page(name)).rstrip() + "\n"


def _page(name: str) -> Iterator[str]:
    first, rest, examples = parts_of(name)
    own, reads = options_of(name), reads_of(name)
    yield f"# `stages.{name}`\n"
    yield f"{_prose(first)}\n"
    for paragraph in rest:
        yield f"{_prose(paragraph)}\n"
    yield "```sh"
    yield from examples or [f"python -m stages.{name}"]
    yield "```\n"
    yield f"With an installed package: `quantline {name}`. `--help` prints this, `--version` the version.\n"
    if own:
        yield "## Options of its own\n"
        yield "| option | what it is | values |\n| --- | --- | --- |"
        for option in own:
            values = ", ".join(f"`{value}`" for value in option.allowed) or f"such as `{option.value}`"
            default = f", by default `{option.default}`" if option.default is not None else ""
            default = f", by default `{option.allowed[0]}`" if option.allowed else default
            needed = "; required" if option.required else ""
            bare = (
                f"; `{option.name}=` may be left out" if option.bare and "may be left out" not in option.about else ""
            )
            yield _row(f"`{option.name}`", f"{_prose(option.about)}{bare}", f"{values}{default}{needed}")
        yield ""
    if reads:
        yield "## Options of the configuration\n"
        yield f"It reads {_links(reads)}. `--help` prints them with their defaults, `--help method=gptq` those of it.\n"
    if name in STAGES:
        yield "## As a stage\n"
        yield from _stage(STAGES[name])
    yield f"{_CODES}\n"
    yield "[Every command](../commands.md)"


def _stage(stage: Stage) -> Iterator[str]:
    environments = [_ENVIRONMENTS.get(lock, f"`{lock}`") for lock in stage.locks]
    home = "shared" if stage.shared else "VARIANT"
    where = f"`scratch/VARIANT/{stage.name}`"
    if not stage.by_hand:
        where = f"`artifacts/{home}/{stage.name}` under `dvc repro`, {where} by hand"
    yield "| | |\n| --- | --- |"
    yield _row("follows", ", ".join(f"[`stages.{name}`]({name}.md)" for name in stage.after) or "nothing")
    yield _row("runs in", " and ".join(dict.fromkeys(environments)) or "the core environment")
    yield _row("writes", where)
    yield _row(
        "run by", "hand only" if stage.by_hand else f"`dvc repro`, as {_number(stage.name)} of {len(PIPELINE)}; by hand"
    )
    yield _row(
        "equal inputs give", "equal bytes" if stage.exact else "equal results within the spread of a server or a timer"
    )
    yield ""


def _number(name: str) -> str:
    return f"stage {PIPELINE.index(name) + 1}"


def _links(keys: Sequence[str]) -> str:
    """Sections of the reference of options; single options stand in its first one."""
    text = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    sections = [key for key in keys if f"## `{key}`\n" in text]
    single = [f"`{key}`" for key in keys if key not in sections]
    found = [f"[`{key}`](../options.md#{key})" for key in sections]
    return ", ".join(
        [*found, *([f"of [the variant](../options.md#the-variant) {', '.join(single)}"] if single else [])]
    )


def _prose(text: str) -> str:
    """A paragraph as Markdown: a page of the documentation becomes a link, brackets mean themselves."""
    text = " ".join(text.split())
    linked = re.sub(r"docs/guide/([a-z-]+)\.md", r"[\1](../../guide/\1.md)", text)
    return linked.replace("<", "&lt;").replace("*", "\\*")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(folder: Path) -> None:
    """Write every page into a folder, and remove pages of commands that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.md"):
        if path.stem not in commands():
            path.unlink()
    for name in commands():
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
