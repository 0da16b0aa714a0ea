"""Project results onto MLflow, loudly and without ever failing a stage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quantline.core.errors import TrackingError
from quantline.lifecycle.storage.dvc_outputs import with_locks
from quantline.lifecycle.tracking.store import experiment_name
from quantline.pipeline.config import Config
from quantline.pipeline.records import VariantRecord, manual_record


def publish_records(
    records: Sequence[VariantRecord],
    config: Config,
    root: Path,
    *,
    report: Path | None = None,
    limit_seconds: float | None = None,
) -> bool:
    """Publish and say so; whether it worked. A server that is down is reported, never raised.

    report: folder of the report of these records. limit_seconds: how long it may take in all; null is as long as it takes.
    """
    from quantline.lifecycle.tracking.writer import publish

    try:
        done = publish(
            with_locks(records), tracking_uri=config.tracking.uri, experiment=experiment_name(config.tracking, config.model),
            root=root, timeout_seconds=config.tracking.timeout_seconds, report=report,
            limit_seconds=limit_seconds,
        )  # fmt: skip
    except TrackingError as error:
        print(f"NOT PUBLISHED: {error}", file=sys.stderr)
        return False
    print(done, file=sys.stderr)
    for warning in done.warnings:
        print(f"  note: {warning}", file=sys.stderr)
    return True


def publish_by_hand(config: Config, variant: str, root: Path) -> None:
    """Publish what a stage by hand measured; somebody waits for the prompt, so it gives up after a while."""
    publish_records([manual_record(root, variant)], config, root, limit_seconds=2 * config.tracking.timeout_seconds)
