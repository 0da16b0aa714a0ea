"""List the runs that lie here, the pipeline's and those by hand: how far they came, quality, size and age."""

from __future__ import annotations

from stages import ROOT, command


def show(_arguments: dict[str, str | None]) -> None:
    from quantline.lifecycle.scratch import entries, table

    print(table(entries(ROOT)))


if __name__ == "__main__":
    command(show, about=__doc__)
