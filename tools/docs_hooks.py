"""MkDocs hooks: decisions and pages of commands are put into the menu, so that one more needs no edit elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMANDS, OVERVIEW = "reference/commands", "reference/commands.md"
FOLDER, INDEX, MARK = "decisions", "decisions/index.md", "<!-- the list is made when the site is built -->"


def decisions(docs: Path) -> list[tuple[str, str]]:
    """File name and heading of every decision, in order.

    Raises:
        ValueError: a decision that does not begin with its heading.
    """
    found = []
    for path in sorted((docs / FOLDER).glob("[0-9]*.md")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if not first.startswith("# "):
            raise ValueError(f"{path}: begin it with its heading, '# NUMBER. WHAT WAS DECIDED'")
        found.append((path.name, first.removeprefix("# ")))
    return found


def on_config(config: Any) -> Any:
    """Replace an index in the menu by a section: the index, then every decision, or every command."""
    docs = Path(config.docs_dir)
    pages: list[Any] = [{title.replace("`", ""): f"{FOLDER}/{name}"} for name, title in decisions(docs)]
    commands: list[Any] = [{path.stem: f"{COMMANDS}/{path.name}"} for path in sorted((docs / COMMANDS).glob("*.md"))]
    for section in config.nav:
        for entries in section.values():
            if isinstance(entries, list):
                for entry in entries:
                    if isinstance(entry, dict) and entry.get("Decisions") == INDEX:
                        entry["Decisions"] = [INDEX, *pages]
                    if isinstance(entry, dict) and entry.get("Every command") == OVERVIEW:
                        entry["Every command"] = [OVERVIEW, *commands]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Fill in the index."""
    if page.file.src_uri != INDEX:
        return markdown
    rows = [f"- [{title}]({name})" for name, title in decisions(Path(config.docs_dir))]
    return markdown.replace(MARK, "\n".join(rows))
