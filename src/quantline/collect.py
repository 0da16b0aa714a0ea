"""Gather what the stages measured, variant by variant, for `publish` and for the table.

Only results that belong together are taken: each one must have been made with the options that its variant has now, from
inputs as they are now, so a stage that has yet to run again after a change is left out rather than shown beside what it
no longer goes with.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantline.compose import read_params
from quantline.config import Config, parse
from quantline.dvc_store import variant_lock
from quantline.errors import UserError
from quantline.formats.container import read_json
from quantline.lineage import options_fingerprint, stage_fingerprint
from quantline.results import read_result
from quantline.tracking_plan import VariantRecord
from quantline.variants import BASELINE, STAGES, stage_paths

# Keys of a frozen file that are Hydra's and no part of the configuration.
_HYDRA_KEYS = ("defaults", "hydra")
BY_HAND = "by-hand/"
MAX_PATCH_CHARS = 1_000_000


def pipeline_records(root: Path) -> list[VariantRecord]:
    """The variants that params.yaml names, the baseline first, as far as the pipeline has come with them.

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
            raise UserError(f"{path}: is no frozen configuration; remove it and run `dvc repro`") from error
        records.append(_record(root, root / "artifacts", name, values, values["frozen"]["overrides"]))
    return [record for record in records if record.results]


def manual_record(root: Path, name: str) -> VariantRecord:
    """A variant that was run by hand, under a name of its own beside the pipeline's.

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
    config = parse(values)
    results = list(_results(root, home, name, config))
    commit, dirty = commit_of(root)
    lock = variant_lock(root, name) if config.frozen is not None else {}
    patch = patch_of(root) if dirty else None
    return VariantRecord(name, values, overrides, results, root, commit, dirty, patch, lock)


def _results(root: Path, home: Path, folder: str, config: Config) -> Iterator[dict[str, Any]]:
    current: dict[str, str] = {}
    for stage in STAGES:
        if config.method.name == BASELINE and stage in ("calibrate", "quantize", "convert"):
            continue
        places = stage_paths(home, folder, stage)
        if not places.result.is_file():
            continue
        result = read_result(places.result)
        if config.frozen is None:
            belongs = result.get("fingerprint") == stage_fingerprint(config, stage, root)
        else:
            belongs = _follows(result, config, stage, root, current)
        if not belongs:
            print(f"{folder}: {stage} is out of date and left out; run it again", file=sys.stderr)
            continue
        current[stage] = str(result["output_hash"])
        # A result may come from somebody else's cache: only files of the stage's own output are attached.
        inside = places.output.resolve()
        files = [str(name) for name in result.get("files", []) if (root / name).resolve().is_relative_to(inside)]
        # The log stays on the machine where the stage ran, and must not make another result of the same one elsewhere.
        log = places.log.relative_to(root).as_posix() if places.log.is_file() else None
        yield {**result, "files": files, "log": log}


def _follows(result: dict[str, Any], config: Config, stage: str, root: Path, current: dict[str, str]) -> bool:
    # DVC does not run a stage again whose inputs came out as they were, so its fingerprint may name older options of the
    # stages before it. It is known by its own options and by what its inputs held.
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


def commit_of(root: Path) -> tuple[str | None, bool]:
    """The checkout's commit, and whether tracked files differ from it; (None, False) outside git."""
    commit = git_output(root, "rev-parse", "HEAD")
    dirty = git_output(root, "status", "--porcelain", "--untracked-files=no")
    return (commit.strip(), bool((dirty or "").strip())) if commit else (None, False)


def patch_of(root: Path) -> str | None:
    """How tracked files differ from the commit, as `git apply` reads it; of one too large, the files alone."""
    patch = git_output(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    if not patch or len(patch) <= MAX_PATCH_CHARS:
        return patch or None
    files = git_output(root, "diff", "--no-ext-diff", "--stat=200", "HEAD")
    return f"# A patch of {len(patch)} characters is not kept, {MAX_PATCH_CHARS} is the limit. Changed were:\n{files}"


def git_output(root: Path, *arguments: str) -> str | None:
    """What git prints of a checkout; None where it fails or is not there."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
