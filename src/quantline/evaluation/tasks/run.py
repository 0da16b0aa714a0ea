"""The tasks stage's work: ask both engines, and hold what they scored against the float model's scores.

The output folder holds `tasks.json` (a row for each task and engine, and the gate's verdict), `items/` with the tasks that
were made of a text, and `samples-<engine>.jsonl`, a line with the scores of every item.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quantline.core.errors import QuantlineError, UserError
from quantline.core.files import read_json, sha256_of, write_json
from quantline.data.documents import format_of, read_documents
from quantline.evaluation import nats
from quantline.evaluation.bootstrap import Bootstrap, paired_recovery
from quantline.evaluation.tasks.local import TASKS, write_tasks
from quantline.serving.server import Server
from quantline.toolchains.protocol import JobResult

# By which metric a task is judged where nothing is said: the first that it has.
PREFERRED = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class Asked:
    """A task. What is None goes by the task's own definition; limit None takes all items."""

    name: str
    num_fewshot: int | None = None
    limit: int | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Gate:
    """The recovery that every task must reach by every engine, at the `judged_by` end of its interval; None asks nothing."""

    min_recovery: float | None
    judged_by: Literal["low", "estimate", "high"]
    on_failure: Literal["warn", "fail"]


@dataclass
class Scores:
    """What one engine scored: `told` by the worker of each task, and the items' rows by task."""

    told: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Report:
    """Metrics and warnings of the stage."""

    metrics: dict[str, float]
    warnings: list[str]


def write_nothing(out: Path) -> None:
    """The output of a stage that asks no task."""
    write_json(out / "tasks.json", {"rows": [], "gate": {"passed": True, "limit": None, "failed": []}})


def local_items(
    tasks: Mapping[str, Mapping[str, int]], *, root: Path, path: str, format_name: str | None, text_field: str, seed: int,
    limit: int | None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The items of the tasks that are made of the text in `path` (from `root`, where it is relative), by task.

    tasks: names of `local_tasks.TASKS` and their settings.

    Raises:
        UserError: the text cannot be read, or gives too few items.
    """
    if not tasks:
        return {}
    file = root / Path(path).expanduser()
    documents = read_documents(file, format_of(file, format_name), (text_field,))
    texts = [document.text for document in documents if document.text]
    return {name: TASKS[name](**settings).items(texts, seed, limit) for name, settings in tasks.items()}


def asked(items: Mapping[str, Any], standard: Mapping[str, Mapping[str, Any]], limit: int | None) -> list[Asked]:
    """The tasks that were made of a text, and then the harness's own; `limit` where one of these has none."""
    own = [Asked(name) for name in items]
    return own + [Asked(name, **{**known, "limit": known["limit"] or limit}) for name, known in standard.items()]


def evaluate(
    *,
    asked: Sequence[Asked],
    items: Mapping[str, Sequence[Mapping[str, Any]]],
    job: Mapping[str, Any],
    run_worker: Callable[[dict[str, Any]], JobResult],
    engines: Sequence[str],
    refused: str,
    server: Callable[[], AbstractContextManager[Server]],
    baseline: Path | None,
    bootstrap: Bootstrap,
    gate: Gate,
    out: Path,
) -> Report:
    """Ask, compare, write.

    items: of the tasks that were made of a text. job: what every engine is told alike, see `toolchains.workers.lm_eval`.
    run_worker: runs that worker. refused: why the server does not take the variant; empty where it does. baseline: the
    float model's output of this stage, None for the float model itself.

    Raises:
        UserError: a task is unknown, its data cannot be reached, or the baseline was asked other items.
        QuantlineError: the gate says so, or a score is not what the harness made of it.
    """
    scores: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory(prefix="quantline-tasks-") as scratch:
        if items:
            write_tasks(items, Path(scratch))
            (out / "items").mkdir()
            for name in items:
                shutil.copyfile(Path(scratch, f"{name}.jsonl"), out / "items" / f"{name}.jsonl")
        local = scratch if items else None
        questions = [{"name": task.name, "num_fewshot": task.num_fewshot, "limit": task.limit} for task in asked]

        def ask(engine: str, **more: Any) -> JobResult:
            output = str(out / f"samples-{engine}.jsonl")
            return run_worker({**job, "engine": engine, "local": local, "tasks": questions, "output": output, **more})

        if any(task.name not in items for task in asked):
            ask("check")  # before an engine starts: whether all of it can be asked
        for engine in engines:
            if engine == "vllm" and refused:
                continue
            if engine == "vllm":
                with server() as running:
                    told = ask(engine, url=running.url).data["tasks"]
            else:
                told = ask(engine).data["tasks"]
            scores[engine] = Scores(told, read_samples(out / f"samples-{engine}.jsonl"))
    rows, more = [], []
    for engine, own in scores.items():
        path = out if baseline is None else baseline
        float_rows = read_samples(path / f"samples-{engine}.jsonl")
        for task in asked:
            kept = _rows(task, engine, own, float_rows.get(task.name, []), bootstrap)
            rows.append(kept[0])
            more.extend(kept[1:])
    verdict = judge(rows, gate)
    agreement = engine_agreement(scores)
    skipped = {"vllm": refused} if refused and "vllm" in engines else {}
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
    return Report(metrics, _warnings(verdict, gate, skipped, scores))


def _warnings(
    verdict: Mapping[str, Any], gate: Gate, skipped: Mapping[str, str], scores: Mapping[str, Scores]
) -> list[str]:
    warnings = [f"tasks were not asked of {engine}: {reason}" for engine, reason in skipped.items()]
    left_out = sorted({metric for own in scores.values() for told in own.told.values() for metric in told["left_out"]})
    if left_out:
        warnings.append(f"metrics that are no mean over items are left out: {', '.join(left_out)}")
    if not verdict["passed"]:
        text = (
            f"recovery is below tasks.gate.min_recovery={gate.min_recovery} ({gate.judged_by} end of its interval): "
            f"{'; '.join(verdict['failed'])}"
        )
        if gate.on_failure == "fail":
            raise QuantlineError(f"{text}. Quantize with more bits or smaller groups, or lower the limit")
        warnings.append(text)
    return warnings


def judge(rows: Sequence[Mapping[str, Any]], gate: Gate) -> dict[str, Any]:
    """`passed`, `limit` and what `failed`, as `task by engine: recovery [low, high]`.

    A recovery that cannot be told, since the float model scored nothing, fails nothing.
    """
    failed = []
    key = "recovery" if gate.judged_by == "estimate" else f"recovery_{gate.judged_by}"
    for row in rows:
        if gate.min_recovery is not None and row[key] is not None and row[key] < gate.min_recovery:
            ends = ", ".join("?" if row[f"recovery_{end}"] is None else f"{row[f'recovery_{end}']:.3f}"
                             for end in ("low", "high"))  # fmt: skip
            failed.append(f"{row['task']} by {row['engine']}: {row['recovery']:.3f} [{ends}]")
    return {"passed": not failed, "limit": gate.min_recovery, "judged_by": gate.judged_by, "failed": failed}


def _rows(
    task: Asked, engine: str, own: Scores, float_rows: Sequence[Mapping[str, Any]], bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """A row for each metric of a task, that which it is judged by first."""
    told, rows = own.told[task.name], own.rows[task.name]
    if [(row["item"], row["hash"]) for row in rows] != [(row["item"], row["hash"]) for row in float_rows]:
        raise UserError(
            f"{task.name}: the float model was asked other items by {engine}; run stages.tasks method=float with the "
            "same options of tasks"
        )
    return [
        _row(task.name, engine, metric, told["metrics"][metric], rows=rows, float_rows=float_rows, bootstrap=bootstrap)
        for metric in _in_order(task, told["metrics"])
    ]


def _in_order(task: Asked, metrics: Mapping[str, Any]) -> list[str]:
    names = sorted(metrics)
    if task.metric is not None and task.metric not in names:
        raise UserError(f"tasks.standard.{task.name}.metric={task.metric}: it has {', '.join(names)}")
    wanted = [task.metric] if task.metric else [
        name for one in PREFERRED for name in names if name.split(",")[0] == one
    ]  # fmt: skip
    first = wanted[0] if wanted else names[0] if names else None
    if first is None:
        raise UserError(f"{task.name}: has no metric that is a mean over its items; leave it out")
    return [first, *(name for name in names if name != first)]


def _row(
    name: str, engine: str, metric: str, known: Mapping[str, Any], *, rows: Sequence[Mapping[str, Any]],
    float_rows: Sequence[Mapping[str, Any]], bootstrap: Bootstrap,
) -> dict[str, Any]:  # fmt: skip
    own, other = (np.array([row["scores"][metric] for row in each], dtype=np.float64) for each in (rows, float_rows))
    value, stderr = aggregate(own, known["aggregation"])
    if known["value"] is not None and not math.isclose(value, known["value"], rel_tol=1e-6, abs_tol=1e-9):
        raise QuantlineError(f"{name}: its items give {metric} {value}, the harness says {known['value']}")
    recovery = paired_recovery(
        own, other, aggregation=known["aggregation"], higher_is_better=known["higher_is_better"], **asdict(bootstrap)
    )
    return {
        "task": name, "metric": metric, "engine": engine, "value": value, "stderr": stderr, "n": len(own),
        "float_value": aggregate(other, known["aggregation"])[0], "recovery": recovery.estimate,
        "recovery_low": recovery.low, "recovery_high": recovery.high, "higher_is_better": known["higher_is_better"],
    }  # fmt: skip


def aggregate(scores: np.ndarray[Any, np.dtype[np.float64]], aggregation: str) -> tuple[float, float]:
    """One value of the items' scores, and its standard error.

    scores: float64 (items,), two at least. aggregation: `mean`; or `perplexity`, exp(-mean) of log-likelihoods, whose
    error is the mean's times the value itself (the delta method).
    """
    mean = math.fsum(scores) / len(scores)
    error = float(scores.std(ddof=1)) / math.sqrt(len(scores))
    if aggregation == "mean":
        return mean, error
    perplexity = nats.exp(-mean)
    return perplexity, perplexity * error


def engine_agreement(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Of each task, the share of items that are right or wrong by both engines alike; empty where one engine was asked."""
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
    """A row with those of its scores that are right or wrong; log-likelihoods never are quite the same."""
    return {"scores": {name: score for name, score in row["scores"].items() if score in (0.0, 1.0)}}


def refusal(served: Path) -> str:
    """Why the server does not take the variant, from the output of serve_smoke; empty where it does."""
    verdict = read_json(served / "verdict.json")
    return "" if verdict["supported"] else str(verdict["reason"])


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
