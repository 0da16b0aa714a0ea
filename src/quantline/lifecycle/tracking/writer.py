"""Publishes results to MLflow: one parent run per variant, one child run per stage.

Only this module, `reader` and `registry` import mlflow, and only when it is used, since the import takes seconds.

The result files are the source of truth, and the tracking server is a view of them. `publish` compares a run with its
planned content and logs what is missing. Publishing twice therefore changes nothing, and the next publish completes an
interrupted one: `quantline.complete`, the hash of a run's content, is set last. A run is extended only if none of its
values has to change, because parameters are immutable and a metric that is logged again gets a history. Otherwise a new
run is created, and the old one stays with `quantline.current` = false.

An experiment is one project: a variant is found by its name there, independent of folder and machine.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantline.core.errors import TrackingError
from quantline.core.files import replaced
from quantline.core.secrets import Scrubber
from quantline.lifecycle.tracking.description import NOTE, opening
from quantline.lifecycle.tracking.projection import RunContent, plan_drill, plan_report, plan_variant
from quantline.lifecycle.tracking.store import Limits, PublishReport, check_reachable, locked, resolve_uri, sqlite_path
from quantline.lifecycle.tracking.view import (
    EXPERIMENT,
    INTRODUCED,
    VIEW,
    VIEW_BY_HAND,
    VIEW_SEARCHES,
    introduction,
    metric_name,
    searches_state,
    sections_of,
    view_path,
    view_state,
)
from quantline.pipeline.paths import BY_HAND
from quantline.pipeline.records import VariantRecord

MAX_TAG_CHARS = 5000
_REMEDY = "Nothing is lost: the result files hold every measurement. Publish them later with"


def comparison_path(uri: str, experiment: str) -> str:
    """`view_path` of an experiment in the database at `uri`, by its name; the list of experiments if it does not exist."""
    with quiet_mlflow(uri, 10):
        from mlflow import MlflowClient

        found = MlflowClient(tracking_uri=uri).get_experiment_by_name(experiment)
    return view_path(found.experiment_id) if found else "/experiments"


def _remedy(records: Sequence[VariantRecord]) -> str:
    commands = [f"`python -m stages.publish variant={one.name}`" for one in records if one.name.startswith(BY_HAND)]
    return f"{_REMEDY} {' and '.join(commands or ['`python -m stages.publish`'])}."


def publish(
    records: Sequence[VariantRecord],
    *,
    tracking_uri: str | None,
    experiment: str,
    root: Path,
    timeout_seconds: float = 10,
    report: Path | None = None,
    drill: Mapping[str, Any] | None = None,
    limit_seconds: float | None = None,
) -> PublishReport:
    """Update the experiment to match `records`; other variants in it do not change.

    report: folder of the report of these records, which becomes a separate run. drill: the result of the fault drill of a
    fleet of them, which becomes another.

    tracking_uri: null means MLFLOW_TRACKING_URI if it is set, else `mlflow.db` in `root`, with artifacts in `mlartifacts`
    in the same folder. timeout_seconds: for one request; gives up on a server after two requests without an answer.
    limit_seconds: for all requests, when a user waits for the end of a stage; null means no limit.

    Raises:
        TrackingError: the server is down, slow or refuses the request; the message contains no credentials. What was
            published until then stays, and the next publish completes it.
    """
    uri = resolve_uri(tracking_uri, root)
    scrubber = Scrubber(uri)
    notes: list[str] = []
    plans = [plan_variant(record, scrubber, notes) for record in records]
    if report is not None:
        plans.append(plan_report(report))
    if drill is not None:
        plans.append(plan_drill(drill, scrubber))
    limits = Limits(timeout_seconds, limit_seconds)
    return send(plans, uri=uri, experiment=experiment, limits=limits, remedy=_remedy(records), notes=notes)


def send(
    plans: Sequence[RunContent], *, uri: str, experiment: str, limits: Limits, remedy: str, notes: Sequence[str] = ()
) -> PublishReport:
    """Bring runs in line with their plans.

    Args:
        plans: the runs.
        uri: of the tracking server, see `resolve_uri`.
        experiment: its name.
        limits: for the server.
        remedy: what a message of a failure ends with.
        notes: of the plans, for the report.

    Raises:
        TrackingError: as `publish`.
    """
    begun, scrubber = time.monotonic(), Scrubber(uri)
    try:
        check_reachable(uri, limits.request)
        with quiet_mlflow(uri, limits.request), locked(uri, limits.whole or max(60.0, limits.request)):
            _ensure_database(uri)
            publisher = _Publisher(uri, experiment, limits.whole, [key for plan in plans for key in plan.metrics])
            for plan in plans:
                publisher.upsert(plan)
    except Exception as error:  # a server, a proxy or a database can raise any exception
        cause = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        # `from None`: the original message may contain credentials, and a traceback would print it.
        raise TrackingError(scrubber(f"MLflow at {uri}: publishing failed: {cause}\n{remedy}")) from None
    return PublishReport(
        scrubber(uri), experiment, publisher.experiment_id, tuple(publisher.created), tuple(publisher.completed),
        tuple(publisher.unchanged), publisher.run_ids, tuple(notes), time.monotonic() - begun,
    )  # fmt: skip


def _ensure_database(uri: str) -> None:
    """Create the SQLite file if it does not exist; migrations run under a temporary name, so it is never incomplete."""
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    if database is None or database.exists():
        return
    with replaced(database) as temporary:
        address = f"sqlite:///{temporary}"
        MlflowClient(tracking_uri=address, registry_uri=address).search_experiments(max_results=1)


class _Timed:
    """A client that starts no request after its time limit, since a slow server may answer each request just in time."""

    def __init__(self, client: Any, limit_seconds: float | None) -> None:
        self._client, self._limit, self._begun = client, limit_seconds, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        if self._limit is not None and time.monotonic() - self._begun > self._limit:
            raise TrackingError(f"it is slow, not done after {self._limit:g} s, the time limit")
        return getattr(self._client, name)


class _Publisher:
    def __init__(self, uri: str, experiment: str, limit_seconds: float | None, metrics: Sequence[str]) -> None:
        from mlflow import MlflowClient

        self._client = _Timed(MlflowClient(tracking_uri=uri, registry_uri=uri), limit_seconds)
        self.experiment_id = self._ensure_experiment(uri, experiment)
        self._describe_experiment(metrics)
        self.created: list[str] = []
        self.completed: list[str] = []
        self.unchanged: list[str] = []
        self.run_ids: dict[str, str] = {}

    def _ensure_experiment(self, uri: str, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "active":
                return str(found.experiment_id)
            restore = f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
            raise TrackingError(f"the experiment {name} was deleted; run {restore}, or set tracking.experiment")
        database = sqlite_path(uri)
        # An embedded store has its artifacts in the same folder; a server chooses the location of its artifacts.
        location = (database.parent / "mlartifacts" / name).as_uri() if database else None
        return str(self._client.create_experiment(name, artifact_location=location))

    def _describe_experiment(self, metrics: Sequence[str]) -> None:
        """Give the experiment its saved view and a description; a description that a user edited is kept."""
        existing = self._client.get_experiment(self.experiment_id).tags
        views = {f"mlflow.sharedViewState.{name}": name == VIEW_BY_HAND for name in (VIEW, VIEW_BY_HAND)}
        wanted = {
            NOTE: introduction(self.experiment_id), "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": metric_name("change_percent"),
            **{key: json.dumps(view_state(sections_of(metrics, existing.get(key)), by_hand=by_hand))
               for key, by_hand in views.items()},
            f"mlflow.sharedViewState.{VIEW_SEARCHES}": json.dumps(searches_state()),
        }  # fmt: skip
        for key, value in wanted.items():
            found = existing.get(key)
            # A note of an older version leads to a view of then.
            ours = found is None or key.startswith("mlflow.sharedViewState") or found.startswith(INTRODUCED)
            if ours and found != value:
                self._client.set_experiment_tag(self.experiment_id, key, value)

    def upsert(self, plan: RunContent) -> None:
        runs = self._search(plan.identity)
        complete = [run for run in runs if run.data.tags.get("quantline.complete") == plan.complete]
        if complete:
            chosen = max(complete, key=lambda run: run.data.tags.get("quantline.current") == "true").info.run_id
            self.unchanged.append(plan.name)
        else:
            parent = next((run for run in runs if self._extends(run, plan)), None)
            (self.completed if parent else self.created).append(plan.name)
            chosen = self._fill(plan, parent, {})
        self._set_current(chosen, runs)
        if plan.identity["quantline.role"] == "search":
            self._set_current_candidates(chosen, runs)
        self.run_ids[plan.name] = chosen

    def _fill(self, plan: RunContent, run: Any | None, also: Mapping[str, str]) -> str:
        """Log the plan to `run` or to a new run; values that are already logged are skipped."""
        if run is None:
            began = plan.started if plan.started is not None else time.time() - plan.seconds
            tags = {**plan.identity, **also}
            run = self._client.create_run(self.experiment_id, int(began * 1000), tags, run_name=plan.name)
        run_id = str(run.info.run_id)
        end = run.info.start_time + int(plan.seconds * 1000)
        self._log(run, plan, end)
        self._log_inputs(run, plan)
        if plan.children:
            children = self._search({"mlflow.parentRunId": run_id})
            for child in plan.children:
                self._fill_child(child, children, run_id)
        self._attach(run_id, plan)
        self._client.set_terminated(run_id, "FINISHED", end)
        self._client.set_tag(run_id, "quantline.complete", plan.complete)
        return run_id

    def _fill_child(self, plan: RunContent, children: Sequence[Any], parent_id: str) -> None:
        result = plan.identity["quantline.result"]
        found = next((run for run in children if run.data.tags.get("quantline.result") == result), None)
        if found is None or found.data.tags.get("quantline.complete") != plan.complete:
            self._fill(plan, found, {"mlflow.parentRunId": parent_id})

    def _log(self, run: Any, plan: RunContent, timestamp: int) -> None:
        from mlflow.entities import Metric, Param, RunTag

        logged = run.data
        params = [Param(key, value) for key, value in plan.params.items() if key not in logged.params]
        metrics = [Metric(key, v, timestamp, 0) for key, v in plan.metrics.items() if key not in logged.metrics]
        wanted = {
            key: value.replace(EXPERIMENT, self.experiment_id)[:MAX_TAG_CHARS] for key, value in plan.tags.items()
        }
        written = logged.tags.get(NOTE)
        if written and not written.startswith(opening(plan.name)) and written != logged.tags.get("quantline.reason"):
            wanted.pop(NOTE, None)  # a user's own
        tags = [RunTag(key, value) for key, value in wanted.items() if logged.tags.get(key) != value]
        # A server accepts at most 100 parameters, 100 tags and 1000 metrics per request; there are far fewer metrics.
        for at in range(0, max(len(params), len(tags), 1), 100):
            batch = metrics if at == 0 else []
            self._client.log_batch(run.info.run_id, batch, params[at : at + 100], tags[at : at + 100])

    def _log_inputs(self, run: Any, plan: RunContent) -> None:
        """Log datasets and system metrics; logging them again does not duplicate them."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

        if plan.datasets:
            uses = [
                DatasetInput(
                    Dataset(use.name, use.digest, "code", use.source, profile=use.profile),
                    [InputTag("mlflow.data.context", use.context)],
                )
                for use in plan.datasets
            ]
            self._client.log_inputs(run.info.run_id, uses)
        began = run.info.start_time
        for at in range(0, len(plan.samples), 1000):  # a server's limit of metrics per request
            batch = plan.samples[at : at + 1000]
            self._client.log_batch(run.info.run_id, [Metric(s.key, s.value, began + s.after, s.step) for s in batch])

    def _attach(self, run_id: str, plan: RunContent) -> None:
        with tempfile.TemporaryDirectory(prefix="quantline-artifacts-") as scratch:
            for name, text in plan.texts.items():
                Path(scratch, name).write_text(text, encoding="utf-8")
            for name, path in plan.files.items():
                target = Path(scratch, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            self._client.log_artifacts(run_id, scratch)

    def _extends(self, run: Any, plan: RunContent) -> bool:
        """Whether the run's content is a part of the plan, because it is earlier or was interrupted."""
        stale = any(plan.params.get(key) != value for key, value in run.data.params.items())
        if stale or not all(_same(plan.metrics.get(key), value) for key, value in run.data.metrics.items()):
            return False
        results = {child.identity["quantline.result"] for child in plan.children}
        children = self._search({"mlflow.parentRunId": str(run.info.run_id)})
        return all(child.data.tags.get("quantline.result") in results for child in children)

    def _set_current(self, chosen: str, others: Sequence[Any]) -> None:
        states = {str(run.info.run_id): run.data.tags.get("quantline.current") for run in others}
        if states.get(chosen) != "true":
            self._client.set_tag(chosen, "quantline.current", "true")
        for run in others:
            if run.info.run_id == chosen or states[run.info.run_id] == "false":
                continue
            if run.info.status == "RUNNING":  # interrupted, and replaced since
                self._client.set_terminated(run.info.run_id, "KILLED")
            self._client.set_tag(run.info.run_id, "quantline.current", "false")

    def _set_current_candidates(self, chosen: str, others: Sequence[Any]) -> None:
        """Mark the candidates as their searches are."""
        for run_id in dict.fromkeys([chosen, *(str(run.info.run_id) for run in others)]):
            current = str(run_id == chosen).lower()
            for child in self._search({"mlflow.parentRunId": run_id}):
                if child.data.tags.get("quantline.current") != current:
                    self._client.set_tag(str(child.info.run_id), "quantline.current", current)

    def _search(self, tags: Mapping[str, str]) -> list[Any]:
        """Runs with these tags, the newest first."""
        conditions = [f"tags.`{key}` = {json.dumps(value)}" for key, value in tags.items()]
        runs: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], " and ".join(conditions), max_results=200, page_token=token,
                order_by=["attributes.start_time DESC"],
            )  # fmt: skip
            runs.extend(page)
            token = page.token
            if not token:
                return runs


def _same(planned: float | None, logged: float) -> bool:
    return planned is not None and (planned == logged or (math.isnan(planned) and math.isnan(logged)))


@contextmanager
def quiet_mlflow(uri: str, timeout_seconds: float) -> Iterator[None]:
    """Import mlflow; inside the block it logs only warnings and uses short timeouts.

    With its defaults, a first call to a server that is down blocks for four minutes.
    """
    variables = {
        "MLFLOW_TRACKING_URI": uri,  # artifact uploads read it from there
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.ceil(timeout_seconds))),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow  # noqa: F401

            for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
