"""What messages advise can be typed: commands and targets exist, and take the options that are given with them."""

from __future__ import annotations

import ast
import importlib
import re
import shlex

import pytest

# `name` in an f-string stands for any value.
VALUE = "x"
COMMAND = re.compile(r"python -m stages\.(\w+)((?: [\w.]+=[^\s`;,)]+| [a-z]+(?=`))*)")
SHELL = re.compile(r"`((?:dvc|make|quantline) [^`]+)`")
OPTION = re.compile(r"(?<![\w./{])((?:[a-z_]+\.)+[a-z_]+)=")
# Sections of other configurations, of a fleet, a search or Hydra, and those whose keys are names.
OTHER = ("hydra", "precisions", "capture", "loss", "size", "fleet", "toolchains")


def messages(root):
    """(place, text) of each string that is no docstring; a value that is filled in is `VALUE`."""
    for path in sorted([*(root / "src").rglob("*.py"), *(root / "stages").glob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
            for part in ast.walk(node) if part is not node
        }  # fmt: skip
        inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = _text(node)
            if text and id(node) not in inside:
                yield f"{path.relative_to(root)}:{node.lineno}", text


def _text(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    return None


@pytest.fixture(scope="module")
def said(root):
    return list(messages(root))


@pytest.fixture(scope="module")
def keys(root):
    """Every option of the configuration, and every beginning of one."""
    page = (root / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    whole = re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE)
    groups = {path.name for path in (root / "conf").iterdir() if path.is_dir()}
    return {*whole, *groups, "variant"}


def examples(root):
    """(place, text) of the examples of each command, which its docstring ends with."""
    for path in sorted((root / "stages").glob("[a-z]*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        yield path.stem, about.partition("\nExamples:\n")[2]


def options_of(stage):
    """The names of a command's own options, and whether it takes a value without a name."""
    options = getattr(importlib.import_module(f"stages.{stage}"), "OPTIONS", [])
    return {option.name for option in options}, any(option.bare for option in options)


def test_the_commands_that_messages_advise_exist_and_take_their_options(root, said, keys):
    wrong, seen = [], 0
    for place, text in said:
        for found in COMMAND.finditer(text):
            stage, given = found[1], found[2].split()
            seen += 1
            if not (root / "stages" / f"{stage}.py").is_file():
                wrong.append((place, found[0]))
                continue
            own, bare = options_of(stage)
            unknown = [
                one for one in given
                if one != VALUE and (one.partition("=")[0] not in own | keys if "=" in one else not bare)
            ]  # fmt: skip
            wrong += [(place, found[0], unknown)] if unknown else []
    assert wrong == []
    assert seen > 20


def test_the_examples_of_a_command_are_its_own_and_take_its_options(root, keys):
    """Each command has one, and nothing stands in it that the command does not take."""
    for stage, text in examples(root):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        assert lines, stage
        own, bare = options_of(stage)
        for line in lines:
            assert f"python -m stages.{stage}" in line, line
            given = shlex.split(line.partition(f"stages.{stage}")[2].replace("| source", "").replace(")", ""))
            named = [one.partition("=")[0] for one in given if "=" in one]
            unknown = [name for name in named if name not in own | keys and name.partition(".")[0] not in OTHER]
            assert unknown == [], line
            words = [
                one
                for one in given
                if "=" not in one and one not in ("-cp", "../variants", "-cn", "float", "--multirun")
            ]
            assert not words or bare, line


def test_what_messages_advise_of_dvc_make_and_the_console_command_can_be_typed(root, said):
    from dvc.cli import parse_args
    from dvc.cli.parser import DvcParserError

    targets = set(re.findall(r"^([a-z][\w-]*):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    wrong, seen = [], 0
    for place, text in said:
        for command in (part for found in SHELL.finditer(text) for part in found[1].split(" && ")):
            program, *arguments = shlex.split(command)
            seen += 1
            if program == "dvc":
                try:
                    parse_args(arguments)
                except DvcParserError:
                    wrong.append((place, command))
            elif program == "make" and arguments[0] not in targets:
                wrong.append((place, command))
            elif program == "quantline" and not (root / "stages" / f"{arguments[0]}.py").is_file():
                wrong += [(place, command)] if arguments[0] not in ("help", "COMMAND") else []
    assert wrong == []
    assert seen > 20


def test_the_options_that_messages_name_are_options(said, keys):
    wrong = [
        (place, found[1]) for place, text in said for found in OPTION.finditer(text)
        if found[1] not in keys and found[1].partition(".")[0] not in OTHER and VALUE not in found[1].split(".")
    ]  # fmt: skip
    assert wrong == []
