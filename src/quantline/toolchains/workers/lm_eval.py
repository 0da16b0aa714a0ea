"""Run tasks of EleutherAI's lm-evaluation-harness on one engine, in the `lm_eval` toolchain.

A job holds (paths are strings):

`engine`    `reference`: the exact float32 model of `checkpoint`, see `workers.reference.engine`, as the harness's HFLM.
            `vllm`: the server at `url`, as the harness's `local-completions`. `check`: none; the tasks are only loaded.
`tasks`     objects with `name`, `num_fewshot` and `limit` (null: the task's own number of examples; all items).
`local`     a folder with definitions of more tasks, or null.
`download`  whether data sets that are not in the local cache may be downloaded.
`output`    gets a JSON line for every item: `task`, `item` (subtask and number), `hash` of the prompt and target, `scores`
            by metric, and `loglikelihoods` of the answers if those were compared.
Also `checkpoint` (its tokenizer serves both engines), `max_length` (tokens of a prompt and its answer; both engines
truncate longer ones the same way), `batch_size`, `concurrency`, `timeout_seconds`, `seed`, `device` and `threads`.

Result: `tasks`, by name: `metrics` (each with its `aggregation`, mean or perplexity, `higher_is_better` and the harness's
own `value`; null for a group, whose items are pooled) and `left_out`, the metrics that are not a mean over items.
"""

from __future__ import annotations

import difflib
import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantline.toolchains.protocol import SERVED_NAME, JobError, Reporter, worker_main
from quantline.toolchains.workers.reference import engine as reference

ENGINES = ("reference", "vllm", "check")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # As in `quantline.data.tokenizer`: AutoTokenizer would replace the file's splitting by that of the model family.
    loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _reference_engine(job: Mapping[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    folder = Path(job["checkpoint"])
    device = reference.prepare(job)
    tokenizer = _tokenizer(folder)
    # When truncating, the harness adds 1 to a model's length and subtracts 1 from a server's. This makes both equal.
    return HFLM(
        pretrained=reference.load_model(folder, device), backend="causal", tokenizer=tokenizer,
        batch_size=int(job["batch_size"]), max_length=int(job["max_length"]) - 2,
        add_bos_token=_begins_with_bos(tokenizer),
    )  # fmt: skip


def _served_engine(job: Mapping[str, Any]) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer = _tokenizer(Path(job["checkpoint"]))
    engine = LocalCompletionsAPI(
        model=SERVED_NAME, base_url=f"{job['url']}/v1/completions", tokenizer_backend="huggingface",
        tokenizer=job["checkpoint"], tokenized_requests=True, num_concurrent=max(2, int(job["concurrency"])),
        max_length=int(job["max_length"]), timeout=int(job["timeout_seconds"]), max_retries=2,
        add_bos_token=_begins_with_bos(tokenizer), seed=int(job["seed"]),
    )  # fmt: skip
    engine.tokenizer = tokenizer
    return engine


def load_tasks(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load the job's tasks and their data; return the harness's objects by task name.

    Raises:
        JobError: tasks that the harness does not know, or whose data is not available; all in one message.
    """
    from lm_eval.tasks import TaskManager

    folder = job.get("local")
    local = {path.stem for path in Path(folder).glob("*.yaml")} if folder else set()
    standard = any(task["name"] not in local for task in job["tasks"])
    manager = TaskManager(include_path=folder, include_defaults=standard)
    loaded, faults = {}, []
    for task in job["tasks"]:
        name = task["name"]
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            faults.append(f"tasks.standard.{name}: lm-evaluation-harness has no such task{hint}")
            continue
        try:
            loaded[name] = manager.load([name])
        except Exception as error:  # loading data sets raises many types of exception, from a dozen libraries
            faults.append(_unreachable(manager, name, error, bool(job["download"])))
    if faults:
        raise JobError("\n  ".join(["these tasks cannot be run:", *faults]))
    return loaded


def _unreachable(manager: Any, name: str, error: Exception, download: bool) -> str:
    datasets = sorted(set(_datasets_of(manager, name)))
    shown = ", ".join(datasets) if datasets else "its data set"
    tried = " and could not be downloaded" if download else ""
    other = "" if download else ", or set tasks.download=true if the hub can be reached"
    reason = " ".join(str(error).split())[:200]
    return (
        f"{name}: {shown} is not in the local cache of data sets{tried}; download it where a network is available and set "
        f"HF_HOME or HF_DATASETS_CACHE to its folder{other} ({type(error).__name__}: {reason})"
    )


def _datasets_of(manager: Any, name: str) -> Iterator[str]:
    """Names of the data sets used by a task or by the members of a group."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    known = entry.cfg or {}
    if known.get("dataset_path"):
        yield str(known["dataset_path"])
    members = known.get("task")
    for member in [*entry.tags, *(members if isinstance(members, list) else [])]:
        # A task's entry lists its tags, and a tag's entry lists its tasks.
        inner = member if isinstance(member, str) else str(member.get("task"))
        if not known.get("dataset_path") and inner != name:
            yield from _datasets_of(manager, inner)


def _aggregation(task: Any, metric: str) -> str | None:
    from lm_eval.api import metrics

    function = task.aggregation().get(metric)
    return {metrics.mean: "mean", metrics.perplexity: "perplexity"}.get(function)


def ask(
    engine: Any, name: str, loaded: Any, *, num_fewshot: int | None, limit: int | None, seed: int
) -> dict[str, Any]:
    """Run one task on an engine.

    Returns:
        `rows`, an object for every item (see the module's description), `metrics` and `left_out`.
    """
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        # As the harness's own command does: a task defined with 0 examples keeps 0.
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)
    # The harness's intervals do not compare a pair of models, so it makes none.
    results = evaluate(lm=engine, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    rows: dict[str, dict[str, Any]] = {}
    metrics: dict[str, dict[str, Any]] = {}
    left_out: set[str] = set()
    for subtask, samples in results["samples"].items():
        task = loaded["tasks"][subtask]
        for sample in samples:
            item = f"{subtask}/{sample['doc_id']}"
            row = rows.setdefault(item, _row(name, item, sample))
            for metric in sample["metrics"]:
                aggregation = _aggregation(task, metric)
                if aggregation is None or not isinstance(sample[metric], int | float):
                    left_out.add(metric)
                    continue
                full = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                row["scores"][full] = float(sample[metric])
                if full not in metrics:
                    better = bool(task.higher_is_better().get(metric, True))
                    metrics[full] = {"aggregation": aggregation, "higher_is_better": better, "value": None}
    # A metric that only some members of a group have is not a metric of the group.
    partial = {full for full in metrics if any(full not in row["scores"] for row in rows.values())}
    left_out |= partial
    metrics = {full: known for full, known in metrics.items() if full not in partial}
    if len(results["samples"]) == 1:
        (reported,) = (results["results"][subtask] for subtask in results["samples"])
        for full, known in metrics.items():
            known["value"] = float(reported[full if "," in full else f"{full},none"])
    return {"rows": list(rows.values()), "metrics": metrics, "left_out": sorted(left_out)}


def _row(name: str, item: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    row = {"task": name, "item": item, "hash": sample["prompt_hash"] + sample["target_hash"], "scores": {}}
    responses = sample["filtered_resps"]
    if all(isinstance(one, tuple | list) and len(one) == 2 for one in responses):
        row["loglikelihoods"] = [float(one[0]) for one in responses]
    return row


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Do one job, see the module's description.

    Raises:
        JobError: an unknown engine, or one of the errors of `load_tasks` and `reference.load_model`.
    """
    if job.get("engine") not in ENGINES:
        raise JobError(f"engine={job.get('engine')!r}: allowed are {', '.join(ENGINES)}")
    # Set before the libraries are imported. The server is on this machine, so requests to it use no proxy.
    offline = "0" if job["download"] else "1"
    os.environ.update(HF_HUB_OFFLINE=offline, HF_DATASETS_OFFLINE=offline, NO_PROXY="127.0.0.1,localhost,::1")
    loaded = load_tasks(job)
    if job["engine"] == "check":
        return {"tasks": sorted(loaded)}
    import torch

    with torch.inference_mode():
        engine = _reference_engine(job) if job["engine"] == "reference" else _served_engine(job)
        results = {}
        with Path(job["output"]).open("w", encoding="utf-8") as file:
            for number, task in enumerate(job["tasks"]):
                name = task["name"]
                report(number, len(job["tasks"]), name)
                result = ask(
                    engine, name, loaded[name], num_fewshot=task["num_fewshot"], limit=task["limit"],
                    seed=int(job["seed"]),
                )  # fmt: skip
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.pop("rows"))
                results[name] = result
        report(len(job["tasks"]), len(job["tasks"]), "tasks")
    return {"tasks": results}


if __name__ == "__main__":
    worker_main(run)
