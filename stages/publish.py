"""Publish every variant of the pipeline to MLflow and print the table that compares them.

Each model has an experiment of its own.

With variant=by-hand/NAME, that manual run is published instead.

Examples:
    python -m stages.publish
    python -m stages.publish variant=by-hand/gptq-w3-g128
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [Option("variant", "by-hand/NAME", "publish this manual run, and not the pipeline's variants")]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def publish(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import TrackingError, UserError
    from quantline.lifecycle.publish import publish_records
    from quantline.pipeline.config import parse
    from quantline.pipeline.fleet_result import current_drill
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.names import model_of
    from quantline.pipeline.paths import BY_HAND
    from quantline.pipeline.records import manual_record, pipeline_records
    from quantline.report.evidence import current_report
    from quantline.report.summary import LEGEND, render_table, variant_table

    name = arguments["variant"]
    if name is not None and not name.startswith(BY_HAND):
        raise UserError(f"variant={name}: give {BY_HAND}NAME; without variant, all of the pipeline's are published")
    records = pipeline_records(ROOT) if name is None else [manual_record(ROOT, name)]
    if not records:
        raise UserError("there are no results to publish; run `dvc repro` first")
    given = any(override.startswith("tracking") for override in HydraConfig.get().overrides.task)
    done, reports = [], []
    for model in dict.fromkeys("" if name else model_of(record.name) for record in records):
        own = [record for record in records if name or model_of(record.name) == model]
        kept = own[0].config
        config = parse({**kept, "tracking": plain(cfg)["tracking"] if given else kept["tracking"]})
        report = None if name else current_report(ROOT, own)
        drill = None if name else current_drill(ROOT, own)
        done.append(not config.tracking.enabled or publish_records(own, config, ROOT, report=report, drill=drill))
        reports.append((model, report))
    print(f"{render_table(variant_table(records))}\n\n{LEGEND}")
    print("\nCompare them in MLflow: make ui")
    for model, report in [] if name else reports:
        of = f" of {model}" if model else ""
        print(f"Which one{of} to ship: {report / 'index.html' if report else 'no current report, run `dvc repro`'}")
    if not all(done):
        raise TrackingError("the table above is complete, but it was not published to MLflow; see NOT PUBLISHED above")


if __name__ == "__main__":
    main(publish, __file__, OPTIONS, __doc__, reads=("tracking",))
