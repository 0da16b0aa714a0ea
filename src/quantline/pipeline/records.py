"""Collects the results of the stages per variant, for `publish` and for the table.

Only up-to-date results are taken: each must have been made with the current options of its variant and from the current
inputs. A stage that has to run again after a change is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.pipeline.compose import read_params
from quantline.pipeline.config import Config, parse, with_current_names
from quantline.pipeline.git import commit_of, patch_of
from quantline.pipeline.identity import options_fingerprint, stage_fingerprint
from quantline.pipeline.paths import read_result, stage_paths
from quantline.pipeline.stages import PIPELINE, of_config

# Keys of a frozen file that are for Hydra and not a part of the configuration.
_HYDRA_KEYS = ("defaults", "hydra")
BY_HAND = "by-hand/"


def pipeline_records(root: Path) -> list[VariantRecord]:
    """The variants of params.yaml that have results, the baseline first.

    Raises:
        UserError: params.yaml or a frozen configuration cannot be read.
    """
    import yaml

    records = []
    for name in read_params(root / "params.yaml")["variants"]:
        path = root / "variants" / f"{name}.yaml"
        if not path.is_file():
            continue
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            values = {key: value for key, value in values.items() if key not in _HYDRA_KEYS}
            values["frozen"]["overrides"]
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a frozen configuration; remove it and run `dvc repro`") from error
        records.append(_record(root, root / "artifacts", name, values, values["frozen"]["overrides"]))
    return [record for record in records if record.results]


def manual_record(root: Path, name: str) -> VariantRecord:
    """A variant that was run manually. Its name begins with `by-hand/`, apart from the pipeline's.

    Raises:
        UserError: nothing was run under that name.
    """
    path = root / "scratch" / name / "config.json"
    if not path.is_file():
        raise UserError(f"scratch/{name}: no stage was run by hand under that name")
    saved = read_json(path)
    record = _record(root, root / "scratch", name, saved["config"], saved["overrides"])
    return replace(record, name=BY_HAND + name)


def _record(root: Path, home: Path, name: str, values: dict[str, Any], overrides: str) -> VariantRecord:
    values = with_current_names(values)  # those of a variant that was frozen by an older version
    config = parse(values)
    results = list(_results(root, home, name, config))
    commit, dirty = commit_of(root)
    patch = patch_of(root) if dirty else None
    return VariantRecord(name, values, overrides, results, root, commit, dirty, patch)


def _results(root: Path, home: Path, folder: str, config: Config) -> Iterator[dict[str, Any]]:
    current: dict[str, str] = {}
    for stage in of_config(config):
        places = stage_paths(home, folder, stage)
        if not places.result.is_file():
            continue
        result = read_result(places.result)
        if config.frozen is None:
            belongs = result.get("fingerprint") == stage_fingerprint(config, stage, root)
        else:
            belongs = _follows(result, config, stage, root, current)
        if not belongs:
            print(f"{folder}: {stage} is out of date and was left out; run it again", file=sys.stderr)
            continue
        current[stage] = str(result["output_hash"])
        # A result may come from another user's cache, so only files of the stage's own output are attached.
        inside = places.output.resolve()
        files = [str(name) for name in result.get("files", []) if (root / name).resolve().is_relative_to(inside)]
        # The log exists only on the machine where the stage ran, and must not change the result's hash elsewhere.
        log = places.log.relative_to(root).as_posix() if places.log.is_file() else None
        yield {**result, "files": files, "log": log}


def _follows(result: dict[str, Any], config: Config, stage: str, root: Path, current: dict[str, str]) -> bool:
    # DVC does not run a stage again when its inputs did not change, so its fingerprint may cover older options of the
    # stages before it. The result is identified by its own options and by the hashes of its inputs.
    if result.get("options") != options_fingerprint(config, stage, root):
        return False
    for name, content in result["inputs"].items():
        of, _, inner = str(name).rpartition("/")
        if of:
            baseline = stage_paths(root / "artifacts", of, inner).result
            found = read_result(baseline).get("output_hash") if baseline.is_file() else None
        else:
            found = current.get(inner)
        if found != content:
            return False
    return True


@dataclass(frozen=True)
class VariantRecord:
    """The record of one variant.

    config: its frozen configuration as plain values. overrides: the override string that made it. results: the existing
    results of the stages. folder: the base of the relative paths in the results' `files`. commit: the code's commit,
    if known; dirty: the checkout differed from it, and patch is the difference. lock: its part of dvc.lock, by which its
    outputs are found in a cache.
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


def by_stage(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results by stage, in the pipeline's order."""
    return {result["stage"]: result for result in sorted(results, key=lambda result: PIPELINE.index(result["stage"]))}
