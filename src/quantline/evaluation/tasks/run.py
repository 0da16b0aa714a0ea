"""The work of the tasks stage: run the tasks with both engines and compare the scores with the float model's.

The output folder holds `tasks.json` (a row for each task and engine, and the gate's verdict), `items/` with the tasks that
were made from a text, and `samples-<engine>.jsonl`, a line with the scores of every item.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantline.config.evaluate import BootstrapConfig
from quantline.config.tasks import GateConfig, StandardTaskConfig, TasksConfig
from quantline.core.errors import QuantlineError, UserError
from quantline.core.files import read_json, sha256_of, write_json
from quantline.data.documents import format_of, read_documents
from quantline.evaluation import nats
from quantline.evaluation.bootstrap import paired_recovery
from quantline.evaluation.tasks.local import Item, items_of, write_tasks
from quantline.evaluation.tasks.own import own_items
from quantline.serving.running import Server
from quantline.toolchains.protocol import JobResult

# The main metric of a task, unless the configuration names one: the first of these that the task has.
PREFERRED = ("acc_norm", "acc", "exact_match")
Row = Mapping[str, Any]


@dataclass
class Scores:
    """The scores of one engine, by task: the worker's summary of the task, and the rows of its items."""

    summaries: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class TasksReport:
    """Metrics and warnings of the stage."""

    metrics: dict[str, float]
    warnings: list[str]


def write_nothing(out: Path) -> None:
    """Write the output of a stage without tasks."""
    write_json(out / "tasks.json", {"rows": [], "gate": {"passed": True, "limit": None, "failed": []}})


def local_items(options: TasksConfig, root: Path) -> dict[str, list[Item]]:
    """The items of the tasks that are made from the text in `options.path`, by task; a relative path starts at `root`.

    Raises:
        UserError: the text cannot be read, or gives too few items.
    """
    file = root / Path(options.path).expanduser()
    own = own_items(file, options.seed, options.limit) if options.local.own else {}
    if not options.local.of_text:
        return own
    texts = []
    for document in read_documents(file, format_of(file, options.format), (options.text_field,)):
        if document.text is None:
            raise UserError(
                f"{file}:{document.line}: has messages, but local tasks are made from text; set tasks.text_field"
            )
        texts += [document.text] if document.text else []
    return {**items_of(options.local, texts, options.seed, options.limit), **own}


def tasks_to_run(items: Iterable[str], options: TasksConfig) -> dict[str, StandardTaskConfig]:
    """The tasks by name: those made from a text, then the harness's own, with `tasks.limit` as their default limit."""
    standard = {
        name: task.model_copy(update={"limit": task.limit or options.limit}) for name, task in options.standard.items()
    }
    return {**{name: StandardTaskConfig() for name in items}, **standard}


def evaluate(
    options: TasksConfig,
    items: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    job: Mapping[str, Any],
    run_worker: Callable[[dict[str, Any]], JobResult],
    server: Callable[[], AbstractContextManager[Server]],
    refused: str,
    baseline: Path | None,
    out: Path,
) -> TasksReport:
    """Run the tasks with each engine, compare them with the float model, and write the results.

    Args:
        options: the tasks, engines, bootstrap and gate.
        items: the items of the tasks that are made from a text.
        job: the part of the job that all engines share, see `toolchains.workers.lm_eval`.
        run_worker: runs that worker.
        server: starts the variant's server.
        refused: why the server does not load the variant; empty if it does.
        baseline: the float model's output of this stage; None for the float model itself.
        out: an empty folder.

    Raises:
        UserError: a task is unknown, its data cannot be reached, or the baseline has other items.
        QuantlineError: the recovery is below a gate that is set to fail, or a score differs from the harness's own value
            for the same items.
    """
    tasks, bootstrap, gate = tasks_to_run(items, options), options.bootstrap, options.gate
    scores: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory(prefix="quantline-tasks-") as scratch:
        if items:
            write_tasks(items, Path(scratch))
            (out / "items").mkdir()
            for name in items:
                shutil.copyfile(Path(scratch, f"{name}.jsonl"), out / "items" / f"{name}.jsonl")
        local = scratch if items else None
        questions = [
            {"name": name, "num_fewshot": task.num_fewshot, "limit": task.limit} for name, task in tasks.items()
        ]

        def ask(engine: str, **more: Any) -> JobResult:
            output = str(out / f"samples-{engine}.jsonl")
            return run_worker({**job, "engine": engine, "local": local, "tasks": questions, "output": output, **more})

        if any(name not in items for name in tasks):
            ask("check")  # before an engine starts, check that all tasks are available
        for engine in options.engines:
            if engine == "vllm" and refused:
                continue
            if engine == "vllm":
                with server() as running:
                    summaries = ask(engine, url=running.url).data["tasks"]
            else:
                summaries = ask(engine).data["tasks"]
            scores[engine] = Scores(summaries, read_samples(out / f"samples-{engine}.jsonl"))
    rows, more = _compared(scores, tasks, out if baseline is None else baseline, bootstrap)
    verdict = judge(rows, gate)
    agreement = engine_agreement(scores)
    skipped = {"vllm": refused} if refused and "vllm" in options.engines else {}
    document = {
        "rows": rows, "more": more, "gate": verdict, "level": bootstrap.level, "seed": bootstrap.seed,
        "items": {name: sha256_of(out / "items" / f"{name}.jsonl") for name in items},
        "skipped": skipped, "engines": agreement,
    }  # fmt: skip
    write_json(out / "tasks.json", document)
    metrics = {}
    for row in rows:
        metrics[f"task/{row['task']}/{row['engine']}"] = row["value"]
        if row["recovery"] is not None:
            metrics[f"recovery/{row['task']}/{row['engine']}"] = row["recovery"]
    metrics.update((f"engine_agreement/{one['task']}", one["same"]) for one in agreement)
    return TasksReport(metrics, _warnings(verdict, gate, skipped, scores))


def _warnings(
    verdict: Mapping[str, Any], gate: GateConfig, skipped: Mapping[str, str], scores: Mapping[str, Scores]
) -> list[str]:
    warnings = [f"tasks were not run with {engine}: {reason}" for engine, reason in skipped.items()]
    summaries = [summary for own in scores.values() for summary in own.summaries.values()]
    left_out = sorted({metric for summary in summaries for metric in summary["left_out"]})
    if left_out:
        warnings.append(f"metrics that are not a mean over items are left out: {', '.join(left_out)}")
    if not verdict["passed"]:
        text = (
            f"recovery is below tasks.gate.min_recovery={gate.min_recovery} ({gate.judged_by} end of its interval): "
            f"{'; '.join(verdict['failed'])}"
        )
        if gate.on_failure == "fail":
            raise QuantlineError(f"{text}. Quantize with more bits or smaller groups, or lower the limit")
        warnings.append(text)
    return warnings


def judge(rows: Sequence[Mapping[str, Any]], gate: GateConfig) -> dict[str, Any]:
    """`passed`, `limit` and what `failed`, as `task by engine: recovery [low, high]`.

    An unknown recovery, because the float model scored zero, does not fail.
    """
    failed = []
    key = "recovery" if gate.judged_by == "estimate" else f"recovery_{gate.judged_by}"
    for row in rows:
        if gate.min_recovery is not None and row[key] is not None and row[key] < gate.min_recovery:
            ends = ", ".join("?" if row[f"recovery_{end}"] is None else f"{row[f'recovery_{end}']:.3f}"
                             for end in ("low", "high"))  # fmt: skip
            failed.append(f"{row['task']} by {row['engine']}: {row['recovery']:.3f} [{ends}]")
    return {"passed": not failed, "limit": gate.min_recovery, "judged_by": gate.judged_by, "failed": failed}


def _compared(
    scores: Mapping[str, Scores], tasks: Mapping[str, StandardTaskConfig], baseline: Path, how: BootstrapConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of each engine and task for its main metric, and rows for its other metrics."""
    rows, more = [], []
    for engine, own in scores.items():
        float_rows = read_samples(baseline / f"samples-{engine}.jsonl")
        for name, task in tasks.items():
            base = float_rows.get(name, [])
            _require_same_items(name, engine, own.rows[name], base)
            first, *others = (
                _row((name, engine, metric), own, base, how)
                for metric in _in_order(name, task.metric, own.summaries[name]["metrics"])
            )
            rows.append(first)
            more.extend(others)
    return rows, more


def _require_same_items(name: str, engine: str, rows: Sequence[Row], float_rows: Sequence[Row]) -> None:
    if [(row["item"], row["hash"]) for row in rows] != [(row["item"], row["hash"]) for row in float_rows]:
        raise UserError(
            f"{name}: the float model was scored on other items with {engine}; give the options of tasks in "
            "`shared:` of params.yaml, so that both are asked the same, then run `dvc repro`"
        )


def _in_order(name: str, chosen: str | None, metrics: Mapping[str, Any]) -> list[str]:
    """A task's metrics, the main one first."""
    names = sorted(metrics)
    if chosen is not None and chosen not in names:
        raise UserError(f"tasks.standard.{name}.metric={chosen}: allowed are {', '.join(names)}")
    wanted = [chosen] if chosen else [metric for one in PREFERRED for metric in names if metric.split(",")[0] == one]
    first = wanted[0] if wanted else names[0] if names else None
    if first is None:
        raise UserError(f"{name}: has no metric that is a mean over its items; remove the task")
    return [first, *(metric for metric in names if metric != first)]


def _row(key: tuple[str, str, str], own: Scores, float_rows: Sequence[Row], how: BootstrapConfig) -> dict[str, Any]:
    name, engine, metric = key
    known = own.summaries[name]["metrics"][metric]
    mine, theirs = (
        np.array([row["scores"][metric] for row in rows], dtype=np.float64) for rows in (own.rows[name], float_rows)
    )
    value, stderr = aggregate(mine, known["aggregation"])
    if known["value"] is not None and not math.isclose(value, known["value"], rel_tol=1e-6, abs_tol=1e-9):
        raise QuantlineError(f"{name}: its items give {metric} {value}, but the harness reports {known['value']}")
    recovery = paired_recovery(
        mine, theirs, aggregation=known["aggregation"], higher_is_better=known["higher_is_better"], how=how
    )
    return {
        "task": name, "metric": metric, "engine": engine, "value": value, "stderr": stderr, "n": len(mine),
        "float_value": aggregate(theirs, known["aggregation"])[0], "recovery": recovery.estimate,
        "recovery_low": recovery.low, "recovery_high": recovery.high, "higher_is_better": known["higher_is_better"],
    }  # fmt: skip


def aggregate(scores: np.ndarray[Any, np.dtype[np.float64]], aggregation: str) -> tuple[float, float]:
    """The aggregate of the items' scores, and its standard error.

    scores: float64 (items,), at least two. aggregation: `mean`; or `perplexity`, exp(-mean) of log-likelihoods, whose
    error is the mean's times the value itself (the delta method).
    """
    mean = math.fsum(scores) / len(scores)
    error = float(scores.std(ddof=1)) / math.sqrt(len(scores))
    if aggregation == "mean":
        return mean, error
    perplexity = nats.exp(-mean)
    return perplexity, perplexity * error


def engine_agreement(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """For each task, the share of items on which both engines are right or both wrong; empty if only one engine ran."""
    if set(scores) < {"reference", "vllm"}:
        return []
    found = []
    for name, rows in scores["reference"].rows.items():
        same = [one["scores"] == other["scores"] for one, other in zip(
            (_counted(row) for row in rows), (_counted(row) for row in scores["vllm"].rows[name]), strict=True
        )]  # fmt: skip
        found.append({"task": name, "same": sum(same) / len(same)})
    return found


def _counted(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with only the scores that are right or wrong; log-likelihoods are never exactly equal."""
    return {"scores": {name: score for name, score in row["scores"].items() if score in (0.0, 1.0)}}


def refusal(path: Path) -> str:
    """Why the server does not load or score the variant, from serve_smoke's verdict.json; empty if it does."""
    verdict = read_json(path)
    return str(verdict.get("prompt_scores") or "") if verdict["supported"] else str(verdict["reason"])


def read_samples(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The items' rows, by task.

    Raises:
        UserError: the file is missing or damaged.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                rows.setdefault(row["task"], []).append(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: scores of tasks cannot be read ({error}); run the stage tasks again") from error
    return rows
