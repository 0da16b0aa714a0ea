"""Register a variant in MLflow's model registry and give it an alias, if it passes its gates.

Examples:
    python -m stages.promote variant=awq-w4-g128 alias=production
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME", "a variant of params.yaml, or by-hand/NAME for a manual run", required=True),
    Option("alias", "NAME", "such as production", required=True),
    Option("upload", "again", "also files that the server has already, such as one that was damaged there",
           allowed=("missing", "again")),
]  # fmt: skip

if TYPE_CHECKING:
    from omegaconf import DictConfig


def promote(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import GateError, TrackingError
    from quantline.lifecycle import promotion
    from quantline.lifecycle.promotion_gates import faults_of
    from quantline.lifecycle.publish import publish_records
    from quantline.lifecycle.shadow import shadow_faults
    from quantline.lifecycle.tracking import registry
    from quantline.lifecycle.tracking.reader import current_run, tracking_of
    from quantline.pipeline.config import parse
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.records import variant_record
    from quantline.report.card import card_of

    name, alias = str(arguments["variant"]), str(arguments["alias"])
    registry.check_alias(alias)
    values = plain(cfg)
    record = variant_record(ROOT, name)
    tracking = tracking_of(values, HydraConfig.get().overrides.task, ROOT, record.name)
    config = parse({**record.config, "tracking": tracking.model_dump(), "promote": values["promote"]})
    faults = faults_of({result["stage"]: result for result in record.results}, config.promote, record.remedy)
    outputs: dict[str, str] = next((one["outputs"] for one in record.results if one["stage"] == "convert"), {})
    faults += shadow_faults(ROOT, config.promote.shadow, name, outputs)
    if faults:
        raise GateError(f"{record.name} is not promoted, it fails these gates:\n  " + "\n  ".join(faults))
    record = promotion.with_whole_lock(record)
    if not publish_records([record], config, ROOT):
        raise TrackingError(
            "a variant is promoted from its MLflow run, which could not be published; see NOT PUBLISHED above"
        )
    run = current_run(tracking, ROOT, record.name, config.model)
    card = card_of(record, model=".", faults=[], run_id=run.run_id)
    what = promotion.promotion_of(record, run, model=promotion.model_name_of(config), card=card, root=ROOT)
    again = arguments["upload"] == "again"
    done = registry.promote(tracking, ROOT, what, alias, upload_again=again)
    upload = f"{done.uploaded / 1e6:.1f} MB uploaded" if done.uploaded else "files already uploaded"
    moved = f", which version {done.before} had before" if done.before else ""
    print(f"{done.model} version {done.version} ({record.name}, {upload}) now has the alias {alias}{moved}")


if __name__ == "__main__":
    main(promote, __file__, OPTIONS, __doc__, reads=("promote", "tracking"))
