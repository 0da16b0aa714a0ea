"""The planned content of MLflow runs; does not import mlflow.

A `RunContent` is one run: its tags, parameters, metrics and artifacts, and the hash of all of them. `writer` logs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantline.core.secrets import Scrubber
from quantline.lifecycle.tracking.datasets import DatasetUse, SystemSample, datasets_of, system_samples
from quantline.lifecycle.tracking.description import NOTE, describe
from quantline.lifecycle.tracking.view import columns_of, figure_metrics
from quantline.pipeline.figures import measured
from quantline.pipeline.paths import BY_HAND, REPORT_MANIFEST
from quantline.pipeline.records import VariantRecord, by_stage
from quantline.pipeline.stages import STAGES, names

# The stages by whose metrics variants are compared.
COMPARED = names(lambda stage: stage.compared)
# Options of the machine, not of the variant. They are not logged as parameters, so that another port makes no new run. What
# was frozen (locks, backends) follows from the options; MLflow's comparison would begin with it.
RUNTIME_KEYS = ("tracking", "promote", "report", "fleet_smoke", "toolchains", "device", "serve.process", "frozen")
MAX_PARAM_CHARS = 6000
MAX_FILE_BYTES = 50_000_000
PROJECTION = 5  # part of the content hash: increase it when the same results should be logged differently


@dataclass
class RunContent:
    """The content of one run. `seconds` is its duration, `started` is in seconds since the epoch."""

    name: str
    identity: dict[str, str]  # tags set when the run is created, by which it is found later
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    texts: dict[str, str]
    files: dict[str, Path]
    complete: str
    started: float | None
    seconds: float
    children: list[RunContent] = field(default_factory=list)
    datasets: tuple[DatasetUse, ...] = ()
    samples: tuple[SystemSample, ...] = ()


def digest(value: object) -> str:
    """SHA-256 of plain values, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def flatten(values: Mapping[str, Any], skip: Sequence[str] = (), prefix: str = "") -> dict[str, str]:
    """Nested values as dotted parameters, without the keys in `skip`; lists and scalars are written as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in skip:
            continue
        if isinstance(value, Mapping):
            flat.update(flatten(value, skip, f"{name}."))
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(text) > MAX_PARAM_CHARS:
            mark = f"... sha256 {digest(value)}"
            text = text[: MAX_PARAM_CHARS - len(mark)] + mark
        flat[_legal(name)[:250]] = text
    return flat


def _legal(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name).strip("/ ")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among values, under names that MLflow takes."""
    # MLflow stores infinity as the largest float. It is replaced here so that a run compares equal to its plan.
    largest = sys.float_info.max
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, (int, float)):
            numbers[_legal(name)] = float(value) if math.isnan(value) else max(-largest, min(largest, float(value)))
    return numbers


def variant_metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of a parent run, with names that have the same meaning for every variant.

    Metrics of the compared stages keep their names; if two of these stages have the same name, the later one keeps it. All
    other metrics are written `stage/name`, and `seconds/<stage>` and `peak_memory_bytes/<stage>` are added.
    """
    metrics: dict[str, float] = {}
    owner: dict[str, str] = {}
    for result in results:
        stage = str(result["stage"])
        for name, value in numbers(result.get("metrics") or {}).items():
            if stage not in COMPARED:
                metrics[f"{stage}/{name}"] = value
                continue
            if name in owner:
                metrics[f"{owner[name]}/{name}"] = metrics[name]
            metrics[name], owner[name] = value, stage
        costs = {f"seconds/{stage}": (result.get("timings") or {}).get("total_seconds")}
        costs[f"peak_memory_bytes/{stage}"] = result.get("peak_memory_bytes")
        costs.update({f"{name}/{stage}": value for name, value in monitor_peaks(result).items()})
        metrics.update(numbers(costs))
    return metrics


def monitor_peaks(result: Mapping[str, Any]) -> dict[str, float]:
    """The peaks of a stage's monitor, summed over GPUs. They are peaks of samples, so a short peak may be missed."""
    peak = (result.get("monitor") or {}).get("peak") or {}
    seen = {"peak_tree_memory_bytes": [peak.get("rss_bytes")]}
    for name in ("memory_used_bytes", "power_watts"):
        seen[f"peak_gpu_{name}"] = [peak[key] for key in peak if key.startswith("gpu") and key.endswith(f"_{name}")]
    known = {name: [value for value in values if value is not None] for name, values in seen.items()}
    return {name: float(sum(values)) for name, values in known.items() if values}


def plan_variant(record: VariantRecord, scrubber: Scrubber, notes: list[str]) -> RunContent:
    """The parent run of a variant, with its stages as children; files that cannot be attached are added to `notes`."""
    results = list(by_stage(scrubber.value(record.results)).values())
    children = [_plan_stage(record, result, notes) for result in results]
    config = scrubber.value(record.config)
    refused = {result["stage"]: str(result.get("reason")) for result in results if result["status"] == "unsupported"}
    served = {result["stage"]: result["status"] == "ok" for result in results}.get("serve_smoke")
    row = measured(record)
    tags = {
        **columns_of(row),
        "quantline.fingerprint": digest([result.get("fingerprint") for result in results]),
        "quantline.overrides": scrubber(record.overrides),
        "quantline.stages": " ".join(result["stage"] for result in results),
        "quantline.status": "unsupported" if refused else "ok",
        "quantline.dirty": str(record.dirty).lower(),
        "quantline.by_hand": str(record.name.startswith(BY_HAND)).lower(),
    }
    if served is not None or refused:
        tags["quantline.served"] = "yes" if served else "no"
    if refused:
        reason = "\n".join(f"{stage}: {why}" for stage, why in refused.items())
        tags["quantline.reason"] = reason
    tags[NOTE] = scrubber(describe(record, results, row, tags["quantline.fingerprint"]))
    if record.commit:
        tags["mlflow.source.git.commit"] = tags["quantline.commit"] = record.commit
    # The baseline's configuration has bits and group_size like every other, but they do not apply to it.
    baseline = (config.get("method") or {}).get("name") == "float"
    params = flatten(config, (*RUNTIME_KEYS, "bits", "group_size") if baseline else RUNTIME_KEYS)
    started, seconds = _times(record.name, results, children)
    texts = {"config.yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}
    if record.patch:
        texts["dirty.patch"] = scrubber(record.patch)
    if record.lock:
        texts["dvc.lock"] = yaml.safe_dump(record.lock)
    # A dataset of two stages is one input of the variant.
    datasets = {(use.name, use.digest): use for child in children for use in child.datasets}
    # dvc.lock is written after the stages. A run without it is completed later rather than replaced.
    held = [child.complete for child in children] + ([record.lock] if record.lock else [])
    metrics = {**numbers(figure_metrics(row)), **variant_metrics(results)}
    return RunContent(
        record.name, {"quantline.role": "variant", "quantline.variant": record.name}, tags, params, metrics, texts, {},
        digest([PROJECTION, params, held]), started, seconds, children, tuple(datasets.values()),
    )  # fmt: skip


def _times(
    name: str, results: Sequence[Mapping[str, Any]], children: Sequence[RunContent]
) -> tuple[float | None, float]:
    """When the first of the variant's own stages began, and the seconds that they took.

    Stages that all variants share and outputs of other runs are not its own. Between two stages others may have run.
    """
    names = (name, name.removeprefix(BY_HAND))
    own = [
        child
        for result, child in zip(results, children, strict=True)
        if result.get("variant") in names and not STAGES[result["stage"]].shared
    ] or children
    starts = [child.started for child in own if child.started is not None]
    return min(starts) if len(starts) == len(own) and own else None, sum(child.seconds for child in own)


def _plan_stage(record: VariantRecord, result: dict[str, Any], notes: list[str]) -> RunContent:
    stage, environment, timings = result["stage"], result.get("environment") or {}, result.get("timings") or {}
    log = result.pop("log", None)
    files: dict[str, Path] = {}
    for name in [*(result.get("files") or []), *([log] if log else [])]:
        path = record.folder / name
        fault = _unattachable(name, path)
        if fault:
            notes.append(f"{record.name} {stage}: {name} is not attached, it {fault}")
        else:
            files[name] = path
    identity = {
        "quantline.role": "stage", "quantline.variant": record.name, "quantline.stage": stage,
        "quantline.fingerprint": str(result.get("fingerprint")), "quantline.result": digest(result),
    }  # fmt: skip
    tags = {"quantline.status": str(result["status"])}
    if result["status"] == "unsupported":
        tags["quantline.reason"] = tags["mlflow.note.content"] = str(result.get("reason"))
    metrics = {**(result.get("metrics") or {}), "peak_memory_bytes": result.get("peak_memory_bytes")}
    metrics.update((name, value) for name, value in timings.items() if name != "started_at")
    metrics.update(monitor_peaks(result))
    contents = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != log}
    return RunContent(
        f"{record.name}: {stage}", identity, tags, flatten(environment), numbers(metrics),
        {"result.json": json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) + "\n"}, files,
        digest([PROJECTION, identity["quantline.result"], contents]),
        timings.get("started_at"), float(timings.get("total_seconds") or 0.0),
        datasets=datasets_of(result, record.config, record.folder),
        samples=system_samples(result),
    )  # fmt: skip


def plan_report(folder: Path) -> RunContent:
    """The run of the report: its recommendation is the description, its files are artifacts.

    The report's hash is a parameter, so another report makes another run and this one does not change.
    """
    manifest = json.loads((folder / REPORT_MANIFEST).read_text(encoding="utf-8"))
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    content = digest({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()})
    note = f"{manifest['headline']} Open `index.html` among the artifacts for the reasons."
    params = {
        "report": content[:16],
        "recommended": str(manifest["chosen"]),
        "variants": " ".join(manifest["variants"]),
    }
    return RunContent(
        "report", {"quantline.role": "report"},
        {"mlflow.note.content": note, "quantline.recommended": params["recommended"]}, params, {}, {}, files,
        digest([PROJECTION, content]), None, 0.0,
    )  # fmt: skip


def plan_drill(drill: Mapping[str, Any], scrubber: Scrubber) -> RunContent:
    """The run of the fault drill of a fleet. drill: its result, see `quantline.pipeline.fleet_result`.

    Another result makes another run, as with variants.
    """
    drill = scrubber.value(dict(drill))
    content = digest(drill)
    params = {
        "drill": content[:16],
        "precision": str(drill.get("precision")),
        "chain": " ".join(drill.get("chain") or []),
    }
    tags = {"quantline.status": str(drill["status"])}
    if drill.get("reason"):
        tags["quantline.reason"] = tags["mlflow.note.content"] = str(drill["reason"])
    return RunContent(
        "fleet_smoke", {"quantline.role": "fleet"}, tags, params, numbers(drill.get("metrics") or {}),
        {"fleet_smoke.json": json.dumps(drill, indent=2, sort_keys=True, ensure_ascii=False) + "\n"}, {},
        digest([PROJECTION, content]), drill.get("started_at"), float(drill.get("seconds") or 0.0),
    )  # fmt: skip


def _unattachable(name: str, path: Path) -> str | None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "lies outside the variant's folder"
    if not path.is_file():
        return "is missing"
    return f"is larger than {MAX_FILE_BYTES} bytes" if path.stat().st_size > MAX_FILE_BYTES else None
