"""Publish results to MLflow; a failure is reported on stderr and never fails a stage."""

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
    """Publish and print the outcome; returns whether it worked. A server that is down is reported, never raised.

    report: folder of the report of these records. limit_seconds: limit for the total time; null is no limit.
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
    """Publish the results of a manual run; it has a time limit, since a user waits for the prompt."""
    publish_records([manual_record(root, variant)], config, root, limit_seconds=2 * config.tracking.timeout_seconds)
