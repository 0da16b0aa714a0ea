"""Rules that hold for all of the library and its entrypoints."""

from __future__ import annotations

import ast

MOST_ARGUMENTS = 8


def public_functions(tree, prefix=""):
    """Functions and methods that a name without a leading underscore leads to, by their dotted names."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node


def arguments_of(function):
    given = function.args
    named = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return named[1:] if named[:1] in (["self"], ["cls"]) else named


def test_no_public_function_takes_more_than_eight_arguments(root):
    found = {}
    for folder in ("src/quantline", "stages"):
        for path in sorted((root / folder).rglob("*.py")):
            for name, function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
                if len(arguments_of(function)) > MOST_ARGUMENTS:
                    found[f"{path.relative_to(root).as_posix()}: {name}"] = arguments_of(function)
    assert found == {}
