"""Writes a variant's line into params.yaml; everything else of the file stays as it is, comments included."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from quantline.core.errors import UserError
from quantline.core.files import replaced
from quantline.pipeline.compose import read_params
from quantline.pipeline.paths import checked_name


def line_of(overrides: Sequence[str]) -> str:
    """Overrides as one line, quoted as in a shell where that is needed."""
    return shlex.join(overrides)


def refuse_unwritable(params: Path, name: str) -> None:
    """Check before long work what can be checked of a variant that is to be added. A taken name may be of the same line.

    Raises:
        UserError: the name is not valid, or params.yaml is malformed or not in a form that a line can be added to.
    """
    checked_name(name)
    read_params(params)
    _end_of_variants(params.read_text(encoding="utf-8"))


def add_variant(params: Path, name: str, overrides: Sequence[str]) -> str:
    """Add a variant at the end of `variants:`; returns its line.

    Raises:
        UserError: the name is not valid or is taken by another line, or params.yaml is malformed.
    """
    checked_name(name)
    line = line_of(overrides)
    known = read_params(params)["own"]
    if known.get(name) == line:
        return line
    if name in known:
        raise UserError(f"apply={name}: {params.name} has that variant with another line; give another name")
    text = params.read_text(encoding="utf-8")
    mark = _end_of_variants(text)
    entry = yaml.safe_dump({name: line}, width=10**9, allow_unicode=True).rstrip("\n")
    before, after = text[:mark].rstrip("\n"), text[mark:].lstrip("\n")
    with replaced(params) as temporary:
        temporary.write_text(f"{before}\n  {entry}\n{after}", encoding="utf-8")
    if read_params(params)["own"].get(name) != line:
        raise RuntimeError(f"{params}: the line of {name} was written wrong")
    return line


def _end_of_variants(text: str) -> int:
    """Where the last value of the block mapping `variants:` ends.

    Raises:
        UserError: it is not a block, but in braces.
    """
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode), "read_params refuses anything else"
    (value,) = [value for key, value in root.value if key.value == "variants"]
    if value.flow_style:
        raise UserError("params.yaml: variants are in braces; write each on a line of its own, and try again")
    last = value.value[-1][1]
    end = text.find("\n", last.end_mark.index)
    return len(text) if end < 0 else end
