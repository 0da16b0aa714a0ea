"""The results and output files of a variant, read once; anything not measured is empty."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.evaluation.speed.trust import trusted
from quantline.pipeline.chosen import kept
from quantline.pipeline.names import frozen_name, is_baseline_name, model_of, own_name
from quantline.pipeline.paths import REPORT_MANIFEST, stage_paths
from quantline.pipeline.records import VariantRecord
from quantline.pipeline.stages import PIPELINE
from quantline.report.summary import variant_table

Row = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """A variant's results, and the output files that the report shows.

    home: artifacts/ or scratch/. summary: its row of `summary.variant_table`.
    """

    record: VariantRecord
    home: Path
    summary: Row

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.record.name

    @property
    def whole_name(self) -> str:
        """Its name in commands: with its model, where params.yaml has several."""
        return frozen_name(self.record.config, self.name)

    @property
    def is_baseline(self) -> bool:
        """Whether it is the float baseline."""
        return bool(self.summary["baseline"])

    @cached_property
    def results(self) -> dict[str, Row]:
        """The results by stage, in the order in which they ran."""
        return {str(result["stage"]): result for result in self.record.results}

    def metrics(self, stage: str) -> Row:
        """A stage's metrics; empty if it did not run."""
        return dict(self.results.get(stage, {}).get("metrics") or {})

    def metric(self, name: str, *stages: str) -> float | None:
        """The metric from the first of the stages that has it."""
        return next((found for stage in stages if (found := self.metrics(stage).get(name)) is not None), None)

    @cached_property
    def comparison(self) -> Row:
        """comparison.json of evaluate."""
        return self._json("evaluate", "comparison.json")

    @cached_property
    def layers(self) -> list[Row]:
        """coverage/layers.csv of quantize."""
        return self._csv("quantize", "coverage/layers.csv")

    @cached_property
    def restored(self) -> list[Row]:
        """restored.csv of evaluate: how much each of the worst linears contributes to the loss."""
        return self._csv("evaluate", "restored.csv")

    @cached_property
    def groups(self) -> list[Row]:
        """groups.csv of evaluate: the loss by group of documents, the worst first."""
        return self._csv("evaluate", "groups.csv")

    @cached_property
    def tasks(self) -> Row:
        """tasks.json of tasks."""
        return self._json("tasks", "tasks.json")

    @cached_property
    def speed(self) -> Row:
        """speed.json of speed, without the figures that its notes disown."""
        return trusted(self._json("speed", "speed.json"))[0]

    @property
    def speed_left_out(self) -> list[str]:
        """What `speed` leaves out, and why."""
        return trusted(self._json("speed", "speed.json"))[1]

    @cached_property
    def proof(self) -> Row:
        """conversion_proof.json of convert."""
        return self._json("convert", "conversion_proof.json")

    @cached_property
    def chosen(self) -> Row:
        """How it was chosen, see `pipeline.chosen`; empty if no command chose it."""
        return kept(self.home, self.name, self.record.overrides)

    @property
    def flags(self) -> list[Row] | None:
        """The alarms that evaluate raised; None if it did not run the measurements for them."""
        result = self.results.get("evaluate", {})
        for place in (result, result.get("tables") or {}, self.comparison):
            if place.get("flags") is not None:
                return list(place["flags"])
        return None

    def monitor(self, stage: str) -> Row:
        """The monitor samples of a stage."""
        return dict(self.results.get(stage, {}).get("monitor") or {})

    def _file(self, stage: str, name: str) -> Path | None:
        # A folder without a current result is out of date or incomplete.
        path = self.record.outputs.get(stage, stage_paths(self.home, self.name, stage).output) / name
        return path if stage in self.results and path.is_file() else None

    def _json(self, stage: str, name: str) -> Row:
        path = self._file(stage, name)
        if path is None:
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); run {stage} again") from error
        return value if isinstance(value, dict) else {}

    def _csv(self, stage: str, name: str) -> list[Row]:
        path = self._file(stage, name)
        if path is None:
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def gather(records: Sequence[VariantRecord], home: Path) -> list[Evidence]:
    """The evidence on every variant, the baseline first, the others in the order of `records`."""
    known = [
        replace(record, results=[result for result in record.results if result["stage"] in PIPELINE])
        for record in records
    ]
    rows = {row["variant"]: row for row in variant_table(known)}
    ordered = sorted(records, key=lambda record: not is_baseline_name(record.name))
    return [Evidence(record, home, rows[record.name]) for record in ordered]


def made_of(records: Iterable[VariantRecord]) -> str:
    """One hash over all results; a report records the hash of its results."""
    contents = [
        [record.name, record.overrides, [{**result, "files": None} for result in record.results]]
        for record in sorted(records, key=lambda record: record.name)
    ]
    return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()


def report_folder(home: Path, model: str) -> Path:
    """Where the report of a model is. home: report/, or its place in scratch/. model: empty where there is one."""
    return home / "models" / model if model else home


def of_model(records: Iterable[VariantRecord], model: str) -> list[VariantRecord]:
    """The variants of a model, without it in their names: its report is about nothing else."""
    return [replace(record, name=own_name(record.name)) for record in records if model_of(record.name) == model]


def current_report(root: Path, records: Sequence[VariantRecord]) -> Path | None:
    """The report of a model if it was made from exactly these results; None if it is missing or out of date.

    records: those of one model.
    """
    model = model_of(records[0].name)
    folder = report_folder(root / "report", model)
    try:
        manifest = json.loads((folder / REPORT_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if manifest.get("made_of") == made_of(of_model(records, model)) else None


def _value(text: str | None) -> Any:
    """A cell of a CSV file: a number if it parses as one, None if it is empty."""
    if text is None or text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def first(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """The first row with these values; an empty row if there is none."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})
