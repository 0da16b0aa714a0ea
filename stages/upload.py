"""Upload a variant with its model card to the Hugging Face hub.

The repository is private, unless public=true. The token is that of HF_TOKEN or of `hf auth login`.

Examples:
    python -m stages.upload variant=awq-w4-g128 repo=OWNER/NAME
    python -m stages.upload variant=awq-w4-g128 repo=OWNER/NAME public=true
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME", "a variant of params.yaml, or by-hand/NAME for a manual run", required=True),
    Option("repo", "OWNER/NAME", "the repository; made if it does not exist", required=True),
    Option("public", "true", "the repository is to be public", allowed=("false", "true")),
    Option("despite", "quality,alarms", "upload it although it fails these gates of promotion"),
    Option("replace", "true", "replace files of the repository that were not uploaded from here",
           allowed=("false", "true")),
]  # fmt: skip

if TYPE_CHECKING:
    from omegaconf import DictConfig


def upload(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from contextlib import suppress

    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import QuantlineError
    from quantline.core.text import decimal_size
    from quantline.lifecycle import upload as uploads
    from quantline.lifecycle.promotion_gates import faults_of
    from quantline.lifecycle.tracking.reader import current_run, tracking_of
    from quantline.pipeline.config import parse
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.records import variant_record
    from quantline.report.card import card_of

    name, repo = str(arguments["variant"]), str(arguments["repo"])
    uploads.check_repo(repo)
    values, record = plain(cfg), variant_record(ROOT, name)
    results = {str(result["stage"]): result for result in record.results}
    config = parse({**record.config, "promote": values["promote"]})
    faults = faults_of(results, config.promote, record.remedy)
    run_id = None
    with suppress(QuantlineError):  # it was not published; the card then names no run
        tracking = tracking_of(values, HydraConfig.get().overrides.task, ROOT, record.name)
        run_id = current_run(tracking, ROOT, record.name, config.model).run_id
    card = card_of(record, model=repo, faults=faults, run_id=run_id)
    uploads.check_gates(record.name, faults, [gate for gate in (arguments["despite"] or "").split(",") if gate])
    what = uploads.upload_of(record, repo, card, run_id)
    done = uploads.upload(what, public=arguments["public"] == "true", replace=arguments["replace"] == "true")
    visible = "private" if done.private else "public"
    print(
        f"{record.name} -> {done.url} ({visible}), commit {done.commit}: {done.files} files, {decimal_size(done.size)}, "
        "every file verified"
    )


if __name__ == "__main__":
    main(upload, __file__, OPTIONS, __doc__, reads=("promote", "tracking"))
