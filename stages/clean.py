"""Remove results of runs by hand from scratch/.

Without apply=true it only lists them.

Examples:
    python -m stages.clean older=7d
    python -m stages.clean run=gptq-w3-g128 apply=true
"""

from __future__ import annotations

from quantline.pipeline.command_line import Option
from stages import ROOT, command

OPTIONS = [
    Option("run", "NAME,NAME", "names of `python -m stages.list`, with or without by-hand/"),
    Option("older", "7d", "all runs by hand whose newest result is older; h, d or w"),
    Option("apply", "true", "remove them; otherwise only list them", allowed=("false", "true")),
]


def clean(arguments: dict[str, str | None]) -> None:
    from quantline.core.text import decimal_size
    from quantline.lifecycle.scratch import remove, selected, table

    names = [name for name in (arguments["run"] or "").split(",") if name]
    found = selected(ROOT, names, arguments["older"])
    print(table(found) if found else "no such runs")
    if found and arguments["apply"] == "true":
        print(f"removed: {decimal_size(remove(ROOT, found))}")
    elif found:
        print("\nnothing was removed; give apply=true")


if __name__ == "__main__":
    command(clean, OPTIONS, __doc__)
