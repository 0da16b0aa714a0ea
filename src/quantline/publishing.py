"""Project results onto MLflow, loudly and without ever failing a stage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quantline.config import Config, ModelConfig, TrackingConfig
from quantline.errors import TrackingError
from quantline.tracking_plan import VariantRecord


def experiment_name(tracking: TrackingConfig, model: ModelConfig) -> str:
    """The configured experiment, else one for the model."""
    from quantline.download import ModelSource, model_name

    source = ModelSource(model.repo, model.revision, model.path)
    return tracking.experiment or f"quantline/{model.name or model_name(source)}"


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
    from quantline.tracking import publish

    try:
        done = publish(
            records, tracking_uri=config.tracking.uri, experiment=experiment_name(config.tracking, config.model),
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
