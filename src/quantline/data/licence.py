"""The licence of a float model, as its publisher says it: in its card on the hub or in its folder, else in a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantline.config.data import ModelConfig
from quantline.data import hub

UNKNOWN, OTHER = "unknown", "other"
# How a licence's own text begins, and the hub's name of it. A text that only mentions one of them is another licence.
_BEGINNINGS = (("apache license version 2.0", "apache-2.0"), ("mit license", "mit"))
_FILES = ("LICENSE*", "LICENCE*", "COPYING*")


@dataclass(frozen=True)
class Licence:
    """A licence under the hub's name for it, such as apache-2.0; `other` has a name of its own, or a link.

    said_by: who says so, for a reader; empty if nobody does.
    """

    name: str = UNKNOWN
    own_name: str | None = None
    link: str | None = None
    said_by: str = ""


def licence_of(model: ModelConfig, files: Path | None) -> Licence:
    """The licence of a model; `unknown` if neither its card nor a file of it says one.

    Args:
        model: where it comes from.
        files: the folder with its downloaded files, if it is there.
    """
    if model.repo is not None:
        found = _of_card(hub.card_data(model.repo, model.revision), f"the card of {model.repo}")
        if found is not None and found.link and not found.link.startswith(("http://", "https://")):
            link = f"{hub.shown_endpoint()}/{model.repo}/blob/{model.revision}/{found.link}"
            found = Licence(found.name, found.own_name, link, found.said_by)
    else:
        found = _of_card(_front_matter(Path(str(model.path)).expanduser() / "README.md"), "the base model's README.md")
    return found or _of_file(files) or Licence()


def _of_card(data: Mapping[str, Any], said_by: str) -> Licence | None:
    given = data.get("license")
    names = [str(name).strip().lower() for name in (given if isinstance(given, list) else [given]) if name]
    if not names or names == [UNKNOWN]:
        return None
    own_name, link = (str(data[key]) if data.get(key) else None for key in ("license_name", "license_link"))
    if len(names) > 1:
        return Licence(OTHER, own_name or "-and-".join(names), link, said_by)
    return Licence(names[0], own_name, link, said_by)


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML header of a card; empty if there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
        values = yaml.safe_load(header[1]) if header else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _of_file(folder: Path | None) -> Licence | None:
    paths = [path for pattern in _FILES for path in sorted(folder.glob(pattern))] if folder is not None else []
    for path in paths:
        words = re.sub(r"[\s,]+", " ", path.read_text(encoding="utf-8", errors="replace")[:400]).strip().lower()
        known = next((name for beginning, name in _BEGINNINGS if words.startswith(beginning)), None)
        said_by = f"the base model's file {path.name}"
        return Licence(known, said_by=said_by) if known else Licence(OTHER, "custom", path.name, said_by)
    return None
