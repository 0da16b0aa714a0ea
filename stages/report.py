"""Write report/: the variant to ship, and the quality, size and speed of each, as HTML, Markdown, CSV and JSON.

In the pipeline also metrics.json and metrics/, the few figures that DVC's tables show. `dvc repro` and `make report` run it.
Of several models each has its own, in report/models/MODEL.

Examples:
    python -m stages.report -cp ../variants -cn float
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def report(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.core.files import building
    from quantline.pipeline.config import parse
    from quantline.pipeline.execute import check_caller
    from quantline.pipeline.fleet_result import current_drill
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.kept_servers import end_servers
    from quantline.pipeline.names import model_of
    from quantline.pipeline.paths import PIPELINE_HOME
    from quantline.pipeline.records import pipeline_records
    from quantline.report.build import build
    from quantline.report.evidence import of_model, report_folder
    from quantline.report.figures import write_figures

    config = parse(plain(cfg))
    check_caller(config, HydraConfig.get().overrides.task)
    end_servers()  # the last stage
    records = pipeline_records(ROOT)
    # A manual run, with other rules for example, writes to scratch/, since report/ and the figures belong to DVC.
    home = ROOT / "report" if config.frozen else ROOT / "scratch" / "report"
    frozen = [model_of(config.frozen.variant)] if config.frozen else []
    for model in frozen or dict.fromkeys(model_of(record.name) for record in records) or [""]:
        out = report_folder(home, model)
        with building(out) as folder:
            own, home_of_model = of_model(records, model), ROOT / PIPELINE_HOME / model
            found = build(own, home_of_model, config.report, folder, current_drill(ROOT, own))
        if config.frozen:
            write_figures(found, ROOT, model)
        of = f"{model}: " if model else ""
        print(f"{of}{found.recommendation.headline} -> {out.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main(report, __file__, about=__doc__, reads=("report",))
