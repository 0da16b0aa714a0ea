"""The pipeline's fault drill of a fleet: where its result lies, and whether it is of the results that are here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.pipeline.names import file_name, frozen_name, model_of
from quantline.pipeline.records import VariantRecord
from quantline.pipeline.stages import is_baseline

FILE = "fleet_smoke.json"
_FOLDER = "fleet_smoke"
# What became of it: every request was answered, some were lost, the fleet cannot run here, or nobody asks for it.
OK, LOST, REFUSED, NOT_ASKED = "ok", "lost", "refused", "not asked for"


def drill_file(root: Path, model: str) -> Path:
    """Where the pipeline's drill writes its result. model: of several; empty where there is one."""
    return root / _FOLDER / f"{model}.json" if model else root / FILE


def content_of(record: VariantRecord) -> str | None:
    """The hash of the checkpoint that serves a variant; None if it has no up-to-date one."""
    from quantline.pipeline.config import parse

    stage = "download" if is_baseline(parse(record.config)) else "convert"
    return next((str(result["output_hash"]) for result in record.results if result["stage"] == stage), None)


def current_drill(root: Path, records: Iterable[VariantRecord]) -> dict[str, Any] | None:
    """The result of the drill if it is of the checkpoints of these records.

    Returns:
        None if none was asked for, or a variant was made again since.

    Raises:
        UserError: the file cannot be read.
    """
    records = list(records)
    whole = [frozen_name(record.config, record.name) for record in records]
    path = drill_file(root, model_of(whole[0]) if whole else "")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run `dvc repro`") from error
    if found.get("status", NOT_ASKED) == NOT_ASKED:
        return None
    now = {file_name(name): content_of(record) for name, record in zip(whole, records, strict=True)}
    made_of = found.get("variants") or {}
    return found if all(now.get(name, one["content"]) == one["content"] for name, one in made_of.items()) else None
