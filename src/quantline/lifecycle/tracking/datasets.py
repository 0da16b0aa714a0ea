"""A stage's datasets and system metrics in MLflow's terms; does not import mlflow.

A dataset is identified by its token ids, not by a file name: two variants have the same calibration dataset in MLflow if
their backends got the same ids. System metrics are the samples of a result's `monitor`, one step each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGEST_CHARS = 36  # MLflow's limit; the full hash is in the profile
MAX_SOURCE_CHARS = 60_000
MAX_SAMPLES = 200


@dataclass(frozen=True)
class DatasetUse:
    """A dataset that is an input of a run.

    context: `calibration` or `evaluation`. digest: the first characters of the hash of the token ids. source: the text
    of the tokens, JSON. profile: the number of tokens and their full hash, JSON.
    """

    name: str
    context: str
    digest: str
    source: str
    profile: str


@dataclass(frozen=True)
class SystemSample:
    """One value of one system metric, `after` milliseconds from the stage's start."""

    key: str
    value: float
    after: int
    step: int


def datasets_of(result: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> tuple[DatasetUse, ...]:
    """The dataset that a stage made or read, from the manifest in its output; empty if there is none.

    folder: base of the relative paths in the result's `files`.
    """
    read = {"calibrate": ("manifest.json", _calibration), "serve_smoke": ("windows.json", _evaluation),
            "evaluate": ("windows.json", _evaluation)}  # fmt: skip
    name, make = read.get(str(result["stage"]), (None, None))
    if name is None or make is None:
        return ()
    # windows.json is not attached to the run, but is in the same folder as the attached files.
    places = {
        (folder / str(file)).parent / name for file in result.get("files") or [] if not str(file).endswith(".log")
    }
    for path in sorted(places):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            return (make(manifest, config),)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged or missing: the run has no dataset until a later publish
    return ()


def _calibration(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> DatasetUse:
    whole = str(manifest["input_ids_sha256"])
    origins = {name: dict(source) for name, source in manifest["sources"].items()}
    profile = {
        "tokens": manifest["total_tokens"], "samples": manifest["options"]["n_samples"],
        "seq_len": manifest["options"]["seq_len"], "input_ids_sha256": whole,
        "tokenizer_sha256": manifest.get("tokenizer_sha256"),
    }  # fmt: skip
    return _use("calibration", (config.get("calibration") or {}).get("name"), whole, origins, profile)


def _evaluation(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> DatasetUse:
    whole, evaluate = str(manifest["sha256"]), config.get("evaluate") or {}
    profile = {
        "scored_tokens": manifest["scored_tokens"], "tokens": manifest["tokens"], "windows": manifest["windows"],
        "documents": len(manifest["document_ids"]), "sha256": whole,
    }  # fmt: skip
    return _use("evaluation", evaluate.get("name"), whole, dict(manifest["protocol"]), profile)


def _use(context: str, name: object, whole: str, source: object, profile: object) -> DatasetUse:
    text = json.dumps(source, sort_keys=True, ensure_ascii=False, default=str)
    return DatasetUse(
        f"{context}: {name or 'unnamed'}", context, whole[:DIGEST_CHARS], text[:MAX_SOURCE_CHARS],
        json.dumps(profile, sort_keys=True, default=str),
    )  # fmt: skip


def system_samples(result: Mapping[str, Any]) -> tuple[SystemSample, ...]:
    """The samples of a result's `monitor`, under MLflow's names of system metrics, `system/...`.

    The column `seconds` counts from the stage's start; each row is a step.
    """
    monitor = result.get("monitor")
    if not isinstance(monitor, Mapping):
        return ()
    columns = [str(column) for column in monitor.get("columns") or []]
    samples = []
    for step, row in enumerate((monitor.get("samples") or [])[:MAX_SAMPLES]):
        values = dict(zip(columns, row, strict=False))
        after = int(float(values.pop("seconds", 0) or 0) * 1000)
        samples += [
            SystemSample(f"system/{re.sub(r'[^A-Za-z0-9_./ -]', '_', name)}", float(value), after, step)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
    return tuple(samples)
