"""Publish results to MLflow; a failure is reported on stderr and never fails a stage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantline.core.errors import TrackingError
from quantline.lifecycle.storage.dvc_lock import REPAIR
from quantline.lifecycle.storage.dvc_outputs import unlocked_stages, with_locks
from quantline.lifecycle.tracking.store import experiment_name, resolve_uri
from quantline.pipeline.config import Config
from quantline.pipeline.paths import BY_HAND, MANUAL_HOME
from quantline.pipeline.records import VariantRecord, manual_record

# What publishing in the background said, below the project's folder.
LOG = f"{MANUAL_HOME}/.publish.log"


def publish_records(
    records: Sequence[VariantRecord],
    config: Config,
    root: Path,
    *,
    report: Path | None = None,
    drill: Mapping[str, Any] | None = None,
    limit_seconds: float | None = None,
) -> bool:
    """Publish and print the outcome; returns whether it worked. A server that is down is reported, never raised.

    report: folder of the report of these records. drill: the result of the fault drill of a fleet of them. limit_seconds:
    limit for the total time; null is no limit.
    """
    from quantline.lifecycle.tracking.writer import publish

    records = with_locks(records)
    notes = [
        f"{record.name}: dvc.lock lacks {', '.join(lost)} as they are here, so that `stages.rebuild` cannot take them from "
        f"a cache; {REPAIR}, then publish again" for record in records if (lost := _lost(record))
    ]  # fmt: skip
    # A part would take the place of the whole that an earlier publish may have recorded.
    records = [replace(record, lock={}) if _lost(record) else record for record in records]
    try:
        done = publish(
            records, tracking_uri=config.tracking.uri, experiment=experiment_name(config.tracking, config.model),
            root=root, timeout_seconds=config.tracking.timeout_seconds, report=report,
            drill=drill, limit_seconds=limit_seconds,
        )  # fmt: skip
    except TrackingError as error:
        print(f"NOT PUBLISHED: {error}", file=sys.stderr)
        return False
    print(done, file=sys.stderr)
    for warning in [*done.warnings, *notes]:
        print(f"  note: {warning}", file=sys.stderr)
    return True


def publish_search(record: Mapping[str, Any], files: Mapping[str, Path], config: Config, root: Path) -> bool:
    """Publish a search and its candidates; returns whether it worked. A server that is down is reported, never raised.

    Args:
        record: of `planning.search_record`.
        files: artifacts by their name there.
        config: which server and experiment.
        root: the checkout.
    """
    from quantline.lifecycle.tracking.searches import publish_plan

    uri, experiment = resolve_uri(config.tracking.uri, root), experiment_name(config.tracking, config.model)
    try:
        done = publish_plan(
            record, files, uri=uri, experiment=experiment, timeout_seconds=config.tracking.timeout_seconds
        )
    except TrackingError as error:
        print(f"NOT PUBLISHED: {error}", file=sys.stderr)
        return False
    print(done, file=sys.stderr)
    return True


def _lost(record: VariantRecord) -> list[str]:
    made = {result["stage"] for result in record.results}
    return [key for stage, key in unlocked_stages(record).items() if stage in made]


def publish_by_hand(config: Config, variant: str, root: Path) -> None:
    """Publish the results of a manual run; it has a time limit, since a user waits for the prompt.

    With `tracking.background` nobody waits: a process of its own does it.
    """
    if config.tracking.background:
        publish_in_background(variant, root)
        return
    record = manual_record(root, BY_HAND + variant)
    publish_records([record], config, root, limit_seconds=2 * config.tracking.timeout_seconds)


def publish_in_background(variant: str, root: Path) -> subprocess.Popen[bytes]:
    """Start `stages.publish` for a manual run and return its process; what it says goes to `LOG`."""
    log = root / LOG
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "stages.publish", f"variant={BY_HAND}{variant}"]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(f"publishing in the background; log: {log}", file=sys.stderr)
    return process
