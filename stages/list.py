"""List the runs that lie here, the pipeline's and those by hand: how far they came, quality, size and age.

Examples:
    python -m stages.list
"""

from __future__ import annotations

from stages import ROOT, command


def show(_arguments: dict[str, str | None]) -> None:
    import shutil

    from quantline.lifecycle.scratch import entries, table

    print(table(entries(ROOT), width=shutil.get_terminal_size((120, 24)).columns))


if __name__ == "__main__":
    command(show, about=__doc__)
