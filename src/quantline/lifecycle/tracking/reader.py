"""Reads a variant's run from MLflow, by id or fingerprint, with its configuration and results."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantline.config.data import ModelConfig
from quantline.config.method import BASELINE
from quantline.config.tracking import TrackingConfig
from quantline.core.errors import QuantlineError, TrackingError, UserError
from quantline.core.secrets import Scrubber
from quantline.lifecycle.tracking.store import check_reachable, experiment_name, resolve_uri, sqlite_path
from quantline.lifecycle.tracking.writer import quiet_mlflow
from quantline.pipeline.lineage.chain import Lineage, ordered
from quantline.pipeline.names import baseline_of
from quantline.pipeline.paths import frozen_path

LOCK_FILE = "dvc.lock"
_LEAST_PREFIX = 6


@dataclass(frozen=True)
class TrackedRun:
    """A variant as recorded in its run.

    config: its configuration as plain values. results: by stage. lock: its part of dvc.lock, {} for a manual run. tags: of
    the run. patch: the difference of the checkout from its commit, if there was one and it was kept.
    """

    run_id: str
    name: str
    experiment: str
    config: dict[str, Any]
    results: dict[str, dict[str, Any]]
    lock: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    patch: str | None = None

    @property
    def chain(self) -> Lineage:
        """Its results as a lineage, without folders of outputs."""
        return Lineage(self.name, f"run {self.run_id}", self.results)

    @property
    def commit(self) -> str | None:
        """The commit of the code, if known."""
        return self.tags.get("quantline.commit")

    @property
    def dirty(self) -> bool:
        """Whether the checkout differed from its commit."""
        return self.tags.get("quantline.dirty") == "true"


def tracking_of(values: Mapping[str, Any], overrides: Sequence[str], root: Path, name: str = "") -> TrackingConfig:
    """Where the variants of this checkout are published: as on the command line, else as in the frozen configuration.

    Args:
        values: the composed configuration, plain.
        overrides: the command line's.
        root: the checkout.
        name: of the variant that is meant, whose model can have its own experiment.
    """
    section = values["tracking"]
    if not any(override.startswith("tracking") for override in overrides):
        section = kept_tracking(root, name) or section
    return TrackingConfig.model_validate(section)


def kept_tracking(root: Path, name: str = "") -> dict[str, Any] | None:
    """The section `tracking` that the float baseline of a variant was frozen with; None if none is.

    name: of a variant; empty for the first of the models.
    """
    ours = [frozen_path(root, baseline_of(name)), frozen_path(root, BASELINE)]
    places = [*ours, *sorted((root / "variants").glob(f"*/{BASELINE}.yaml"))]
    kept = next((place for place in places if place.is_file()), None)
    values = yaml.safe_load(kept.read_text(encoding="utf-8")) if kept else None
    return (values or {}).get("tracking")


@contextmanager
def connected(tracking: TrackingConfig, root: Path, *, timeout_seconds: float | None = None) -> Iterator[Any]:
    """An MlflowClient; errors inside the block are raised without credentials.

    Raises:
        UserError: there is no store yet.
        TrackingError: the server is down, slow or refuses the request.
    """
    uri = resolve_uri(tracking.uri, root)
    scrubber, database = Scrubber(uri), sqlite_path(uri)
    if database is not None and not database.is_file():
        raise UserError(
            f"{database}: nothing was published there yet; run `python -m stages.publish`, or set tracking.uri"
        )
    try:
        check_reachable(uri, tracking.timeout_seconds)
        with quiet_mlflow(uri, timeout_seconds or tracking.timeout_seconds):
            from mlflow import MlflowClient

            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (QuantlineError, OSError) as error:
        if isinstance(error, TrackingError):
            raise TrackingError(scrubber(f"MLflow at {uri}: {error}")) from None
        raise
    except Exception as error:  # a server, a proxy or a database can raise any exception
        raise TrackingError(scrubber(f"MLflow at {uri}: {type(error).__name__}: {error}")) from None


def read_run(tracking: TrackingConfig, root: Path, given: str) -> TrackedRun:
    """The variant's run with this id or fingerprint, or a prefix of one, or the current run of the variant of this name.

    Raises:
        UserError: no run matches, or more than one.
        TrackingError: MLflow does not answer.
    """
    with connected(tracking, root) as client:
        return load_run(client, find_run(client, given))


@dataclass(frozen=True)
class Current:
    """The current run of a variant."""

    run_id: str
    fingerprint: str


def current_run(tracking: TrackingConfig, root: Path, name: str, model: ModelConfig) -> Current:
    """The current run of a variant that was just published.

    Raises:
        TrackingError: it does not exist.
    """
    with connected(tracking, root) as client:
        experiment = client.get_experiment_by_name(experiment_name(tracking, model))
        condition = f"tags.`quantline.variant` = {json.dumps(name)} and tags.`quantline.role` = 'variant'"
        for run in all_runs(client, [str(experiment.experiment_id)] if experiment else [], condition):
            if run.data.tags.get("quantline.current") == "true":
                return Current(str(run.info.run_id), str(run.data.tags.get("quantline.fingerprint")))
        raise TrackingError(f"{name} has no run in MLflow; publish it again with `python -m stages.publish`")


def find_run(client: Any, given: str) -> Any:
    """The matching run of a variant, in all experiments; of several with the same fingerprint, the current one.

    Args:
        client: an MlflowClient.
        given: the id or fingerprint of the run or of one of its stages, or at least the first 6 digits of one; or the
            name of a variant, whose current run is meant.

    Raises:
        UserError: no run matches, or more than one.
    """
    prefix = re.fullmatch(r"[0-9a-f]+", given) is not None and len(given) >= _LEAST_PREFIX
    experiments = {str(item.experiment_id): str(item.name) for item in client.search_experiments()}
    runs = {str(run.info.run_id): run for run in all_runs(client, list(experiments), "tags.`quantline.role` != ''")}
    parents = {}
    for run_id, run in runs.items():
        tags = run.data.tags
        named = tags.get("quantline.variant") == given and tags.get("quantline.current") == "true"
        digits = run_id.startswith(given) or tags.get("quantline.fingerprint", "").startswith(given)
        if named or (prefix and digits):
            parent = runs.get(run.data.tags.get("mlflow.parentRunId", run_id))
            if parent is not None and parent.data.tags.get("quantline.role") == "variant":
                parents[str(parent.info.run_id)] = parent
    if len(parents) > 1:
        current = [run for run in parents.values() if run.data.tags.get("quantline.current") == "true"]
        parents = {str(run.info.run_id): run for run in current} if len(current) == 1 else parents
    if len(parents) == 1:
        return next(iter(parents.values()))
    if not parents:
        names = {str(run.data.tags.get("quantline.variant")) for run in runs.values()} - {"None"}
        raise UserError(
            f"run={given}: is no variant, and no run or fingerprint in the {len(experiments)} experiments starts with it; "
            f"give a name ({', '.join(sorted(names)) or 'nothing is published'}), an id or a fingerprint, or its first "
            f"{_LEAST_PREFIX} digits or more"
        )
    shown = ", ".join(f"{run_id} ({run.info.run_name})" for run_id, run in sorted(parents.items())[:8])
    raise UserError(f"run={given}: matches {len(parents)} runs: {shown}; give one of these")


def all_runs(client: Any, experiments: list[str], condition: str) -> list[Any]:
    """Every run that meets a condition, from all pages."""
    runs: list[Any] = []
    token = None
    while experiments:
        page = client.search_runs(experiments, condition, max_results=500, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            break
    return runs


def load_run(client: Any, run: Any) -> TrackedRun:
    """Read a variant's run with its stages.

    Raises:
        UserError: it has no configuration or no results: it is from another project, or its publish was interrupted.
    """
    run_id, tags = str(run.info.run_id), dict(run.data.tags)
    condition = f"tags.`mlflow.parentRunId` = {json.dumps(run_id)}"
    children = all_runs(client, [str(run.info.experiment_id)], condition)
    results = [json.loads(text) for child in children if (text := artifact(client, child.info.run_id, "result.json"))]
    config = yaml.safe_load(artifact(client, run_id, "config.yaml") or "")
    if not isinstance(config, dict) or not results:
        raise UserError(f"run {run_id} ({run.info.run_name}): has no configuration or no results; publish it again")
    lock = yaml.safe_load(artifact(client, run_id, LOCK_FILE) or "") or {}
    experiment = str(client.get_experiment(run.info.experiment_id).name)
    return TrackedRun(
        run_id, str(tags.get("quantline.variant", run.info.run_name)), experiment, config, ordered(results), lock, tags,
        _patch(client, run_id),
    )  # fmt: skip


def artifact(client: Any, run_id: str, name: str) -> str | None:
    """The text of an artifact of a run; None if the run does not have it."""
    folder, _, _ = name.rpartition("/")
    if name not in {item.path for item in client.list_artifacts(run_id, folder or None)}:
        return None
    with tempfile.TemporaryDirectory(prefix="quantline-artifact-") as scratch:
        return Path(client.download_artifacts(run_id, name, scratch)).read_text(encoding="utf-8")


def _patch(client: Any, run_id: str) -> str | None:
    names = [item.path for item in client.list_artifacts(run_id) if str(item.path).endswith((".patch", ".diff"))]
    return artifact(client, run_id, names[0]) if names else None
