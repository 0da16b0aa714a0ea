"""Collects the results of the stages per variant, for `publish` and for the table.

Only up-to-date results are taken: each must have been made with the current options of its variant and from the current
inputs. A stage that has to run again after a change is left out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.pipeline.compose import read_frozen, read_params
from quantline.pipeline.config import Config, parse, with_current_names
from quantline.pipeline.git import commit_of, patch_of
from quantline.pipeline.identity import options_fingerprint, stage_fingerprint
from quantline.pipeline.inputs import command_for, output_with_fingerprint
from quantline.pipeline.names import baseline_of
from quantline.pipeline.paths import (
    BY_HAND,
    PIPELINE_HOME,
    SAVED,
    StagePaths,
    Taken,
    frozen_path,
    manual_paths,
    not_among,
    read_result,
    run_folder,
    run_names,
    stage_paths,
    taken,
)
from quantline.pipeline.stages import PIPELINE, STAGES, of_config

# The results of a run in order, and the folders of their outputs by stage.
Found = tuple[list[dict[str, Any]], dict[str, Path]]


def pipeline_records(root: Path) -> list[VariantRecord]:
    """The variants of params.yaml that have results, the baseline first.

    Raises:
        UserError: params.yaml or a frozen configuration cannot be read.
    """
    records = []
    for name in read_params(root / "params.yaml")["variants"]:
        path = frozen_path(root, name)
        if not path.is_file():
            continue
        values = read_frozen(path)
        records.append(_record(root, name, values, values["frozen"]["overrides"]))
    return [record for record in records if record.results]


def manual_record(root: Path, name: str) -> VariantRecord:
    """A manual run. Its name begins with `by-hand/`, apart from the pipeline's variants.

    Outputs that its stages took from another run belong to its record, too.

    Args:
        root: the checkout.
        name: `by-hand/NAME`.

    Raises:
        UserError: nothing was run under that name.
    """
    folder = run_folder(root, name)
    if not name.startswith(BY_HAND) or folder is None or not (folder / SAVED).is_file():
        raise UserError(f"{name}: no stage was run by hand under that name")
    saved = read_json(folder / SAVED)
    return _record(root, name, saved["config"], saved["overrides"])


def variant_record(root: Path, name: str) -> VariantRecord:
    """The record of a variant of params.yaml, or with `by-hand/NAME` that of a manual run.

    Raises:
        UserError: there is none with that name; the message lists those that there are.
    """
    if name.startswith(BY_HAND) and name in run_names(root, *PIPELINE):
        return manual_record(root, name)
    records = {record.name: record for record in pipeline_records(root)}
    if name not in records:
        manual = [known for known in run_names(root, *PIPELINE) if known.startswith(BY_HAND)]
        raise UserError(f"variant={name}: {not_among(name, [*records, *manual])}")
    return records[name]


def _record(root: Path, name: str, values: dict[str, Any], overrides: str) -> VariantRecord:
    values = with_current_names(values)  # those of a variant that was frozen by an older version
    config = parse(values)
    if config.frozen is None:
        results, outputs = _manual_results(root, name, config, overrides)
    else:
        results, outputs = _pipeline_results(root, name, config)
    commit, dirty = commit_of(root)
    patch = patch_of(root) if dirty else None
    return VariantRecord(name, values, overrides, results, root, commit, dirty, patch, outputs=outputs)


def _pipeline_results(root: Path, name: str, config: Config) -> Found:
    found: list[dict[str, Any]] = []
    outputs: dict[str, Path] = {}
    current: dict[str, dict[str, Any]] = {}
    for stage in of_config(config):
        places = stage_paths(root / PIPELINE_HOME, name, stage)
        if not places.result.is_file():
            continue
        result = read_result(places.result)
        if not _follows(name, result, config, root, current):
            print(f"{name}: {stage} is out of date and was left out; run `dvc repro`", file=sys.stderr)
            continue
        current[stage] = result
        found.append(_with_files(root, places, result))
        outputs[stage] = places.output
    return found, outputs


def _manual_results(root: Path, name: str, config: Config, overrides: str) -> Found:
    outputs: dict[str, Path] = {}
    wanted: dict[Taken, str] = {}  # what later stages were made from, with the hashes
    stale = []
    for stage in reversed(of_config(config)):
        places = manual_paths(root, config, name.removeprefix(BY_HAND), stage)
        fingerprint = stage_fingerprint(config, stage, root)
        own = read_result(places.result) if places.result.is_file() and not STAGES[stage].shared else {}
        found = places.output if own.get("fingerprint") == fingerprint else None
        asked = {took: content for took, content in wanted.items() if took.stage == stage and not took.baseline}
        if found is None and asked:
            found = output_with_fingerprint(root, stage, fingerprint)
        result = read_result(StagePaths(found).result) if found is not None else {}
        if found is not None and all(took.content(result) == content for took, content in asked.items()):
            outputs[stage] = found
            wanted.update(taken(result))
        elif own:
            stale.append((stage, command_for(stage, shlex.split(overrides))))
    for stage, command in reversed(stale):
        print(
            f"{name}: {stage} is of other options or code and was left out; to make it, run: {command}", file=sys.stderr
        )
    ordered = {stage: StagePaths(outputs[stage]) for stage in PIPELINE if stage in outputs}
    found_results = [_with_files(root, places, read_result(places.result)) for places in ordered.values()]
    return found_results, outputs


def _with_files(root: Path, places: StagePaths, result: dict[str, Any]) -> dict[str, Any]:
    # A result may come from another user's cache, so only files of the stage's own output are attached.
    inside = places.output.resolve()
    files = [str(name) for name in result.get("files", []) if (root / name).resolve().is_relative_to(inside)]
    # The log exists only on the machine where the stage ran, and must not change the result's hash elsewhere.
    log = places.log.relative_to(root).as_posix() if places.log.is_file() else None
    return {**result, "files": files, "log": log}


def _follows(name: str, result: dict[str, Any], config: Config, root: Path, current: dict[str, dict[str, Any]]) -> bool:
    # DVC does not run a stage again when its inputs did not change, so its fingerprint may cover older options of the
    # stages before it. The result is identified by its own options and by the hashes of its inputs.
    if result.get("options") != options_fingerprint(config, str(result["stage"]), root):
        return False
    for took, content in taken(result).items():
        source = current.get(took.stage, {})
        if took.baseline:
            path = stage_paths(root / PIPELINE_HOME, baseline_of(name), took.stage).result
            source = read_result(path) if path.is_file() else {}
        if took.content(source) != content:
            return False
    return True


@dataclass(frozen=True)
class VariantRecord:
    """The record of one variant.

    config: its frozen configuration as plain values. overrides: the override string that made it. results: the existing
    results of the stages. folder: the base of the relative paths in the results' `files`. commit: the code's commit,
    if known; dirty: the checkout differed from it, and patch is the difference. lock: its part of dvc.lock, by which its
    outputs are found in a cache. outputs: the folders of the stages' outputs, by stage.
    """

    name: str
    config: dict[str, Any]
    overrides: str
    results: list[dict[str, Any]]
    folder: Path
    commit: str | None = None
    dirty: bool = False
    patch: str | None = None
    lock: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Path] = field(default_factory=dict)

    def remedy(self, stage: str) -> str:
        """The command that makes this variant's result of a stage."""
        return command_for(stage, shlex.split(self.overrides)) if self.name.startswith(BY_HAND) else "dvc repro"

    def restoring(self, stage: str) -> str:
        """The command that brings the output of a stage back as it was recorded."""
        if self.name.startswith(BY_HAND):
            return self.remedy(stage)
        folder = self.outputs[stage]
        shown = folder.relative_to(self.folder) if folder.is_relative_to(self.folder) else folder
        return shlex.join(["dvc", "checkout", "--force", str(shown)])


def by_stage(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results by stage, in the pipeline's order."""
    return {result["stage"]: result for result in sorted(results, key=lambda result: PIPELINE.index(result["stage"]))}
