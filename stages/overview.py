"""Write the page over all models of params.yaml: which variant of each to ship, with a link to each report.

It reads the reports in report/models, and writes report/index.html, report/report.md, report/data and metrics.json.
`dvc repro` runs it where params.yaml has `models:`.

Examples:
    python -m stages.overview
"""

from __future__ import annotations

from stages import ROOT, command


def overview(_arguments: dict[str, str | None]) -> int:
    from quantline.core.errors import UserError
    from quantline.pipeline.compose import read_params
    from quantline.report.overview import write_overview

    models = list(map(str, read_params(ROOT / "params.yaml").get("models") or ()))
    if not models:
        raise UserError(
            "params.yaml has no `models:`, and of one model report/index.html is the report; see stages.report"
        )
    for headline in write_overview(ROOT, models):
        print(headline)
    print("-> report/index.html")
    return 0


if __name__ == "__main__":
    command(overview, about=__doc__)
