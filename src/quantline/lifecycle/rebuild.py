"""Bring a variant back from its MLflow run alone: from DVC's cache or a remote, or by making it again from its sources.

Everything is verified against the hashes that the run recorded: each file and tensor of the outputs, and the evaluation's
metrics. What comes back appears in its folder whole, and only if it is identical.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.core.files import passing, write_json
from quantline.lifecycle.storage.dvc_outputs import fetch_outputs, outputs_of
from quantline.lifecycle.tracking.reader import TrackedRun
from quantline.lifecycle.worktree import Worktree, baseline_config, make_worktree
from quantline.pipeline.hashing import hash_folder
from quantline.pipeline.identity import combined
from quantline.pipeline.lineage.chain import Lineage
from quantline.pipeline.lineage.diff import Difference, outcome_difference, stage_difference
from quantline.pipeline.paths import read_result
from quantline.pipeline.stages import STAGES, baseline_stages, names
from quantline.toolchains.environments import detect_platform

MADE_AGAIN = names(lambda stage: stage.rebuilt)


@dataclass(frozen=True)
class Rebuilt:
    """What became of it: `how` from where, `compared` what was looked at, `difference` None where it is identical."""

    how: str
    compared: list[str]
    difference: Difference | None


@dataclass(frozen=True)
class RebuildOptions:
    """How a variant is made again.

    until: the last stage. toolchains: interpreters of this machine in place of its environments; those that the run names
    are another machine's. trust_patch: apply the run's patch, code that comes from the tracking server.
    """

    until: str = "evaluate"
    toolchains: Mapping[str, str | None] = field(default_factory=dict)
    trust_patch: bool = False


def rebuild(
    run: TrackedRun,
    out: Path,
    root: Path,
    *,
    source: str,
    remote: str | None = None,
    making: RebuildOptions | None = None,
) -> Rebuilt:
    """Bring a variant back to `out`: a folder for each of its stages, `convert` being the checkpoint, and their results.

    Args:
        run: what MLflow tells of it.
        out: a folder that does not exist; made only where everything is identical.
        root: the checkout.
        source: `cache`, `source`, or `auto`, which makes it again where it is not in the cache.
        remote: DVC's remote to look in; null is the default one.
        making: how it is made again.

    Raises:
        UserError: it is not in the cache, its code or its model is not here, or `out` exists.
    """
    if out.exists():
        raise UserError(f"out={out}: is there already; give a folder that is not")
    with passing(out.with_name(f".{out.name}.partial")) as folder:
        missing: list[str] = []
        if source != "source":
            missing, rebuilt = _from_cache(run, folder, root, remote)
            if missing and source == "cache":
                raise UserError(
                    f"{run.name} is not in DVC's cache: {'; '.join(missing)}; give from=source to make it again"
                )
            for reason in missing:
                print(f"not from the cache: {reason}", file=sys.stderr, flush=True)
        if source == "source" or missing:
            rebuilt = _from_source(run, folder, root, making or RebuildOptions())
        if rebuilt.difference is None:
            os.replace(folder / "result", out)
    return rebuilt


def _wanted(run: TrackedRun) -> list[str]:
    baseline = (run.config.get("method") or {}).get("name") == BASELINE
    return [stage for stage in run.results if stage in MADE_AGAIN and (baseline or STAGES[stage].kept)]


def _from_cache(run: TrackedRun, folder: Path, root: Path, remote: str | None) -> tuple[list[str], Rebuilt]:
    target, outs = folder / "result", {}
    for stage in _wanted(run):
        for name, out in outputs_of(run.lock, stage).items():
            outs[target / name] = out
    rebuilt = Rebuilt("DVC's cache", [], None)
    if target / "convert" not in outs and target / "download" not in outs:
        return ["its run names no output of DVC's: it was run by hand, or published before the pipeline ended"], rebuilt
    target.mkdir()
    missing = fetch_outputs(root, outs, remote)
    if missing:
        shutil.rmtree(target)
        return missing, rebuilt
    for stage in [stage for stage in _wanted(run) if (target / stage).is_dir()]:
        result = read_result(target / f"{stage}.json")
        chain = Lineage(run.name, "DVC's cache", {stage: _measured(result, target / stage)}, {stage: target / stage})
        found = outcome_difference(stage, run.chain, chain, exact=True)
        rebuilt.compared.append(_said(stage, run.results[stage]))
        if found is not None:
            return [], replace(rebuilt, difference=found)
    _write_run(run, target, "DVC's cache")
    return [], rebuilt


def _measured(result: dict[str, Any], output: Path) -> dict[str, Any]:
    """A result with the hashes of what lies there now, rather than of what lay there when it was written."""
    hashes = hash_folder(output)
    return {**result, "outputs": hashes.files, "tensors": hashes.tensors, "output_hash": combined(hashes.files)}


def _said(stage: str, result: dict[str, Any]) -> str:
    parts = [
        f"{len(result.get('outputs') or {})} files" if STAGES[stage].exact else f"{len(result['metrics'])} metrics"
    ]
    if STAGES[stage].exact and result.get("tensors"):
        parts.append(f"{len(result['tensors'])} tensors")
    return f"{stage} ({', '.join(parts)})"


def _from_source(run: TrackedRun, folder: Path, root: Path, making: RebuildOptions) -> Rebuilt:
    stages = _stages(run, making.until)
    _check_device(run, stages)
    code = {
        stage: run.results[stage]["identity"]["code"] for stage in stages if "identity" in run.results.get(stage, {})
    }
    if not code:
        raise UserError(f"run {run.run_id}: was published by a version that did not record its code; give from=cache")
    area = make_worktree(
        folder / "work", root, commit=run.commit, patch=run.patch, code=code, trust_patch=making.trust_patch
    )
    print(f"made again from {area.origin}", file=sys.stderr, flush=True)
    name = run.name.rpartition("/")[2]
    config = runnable(run, stages, making.toolchains)
    area.freeze(name, config)
    if name != BASELINE:
        area.freeze(BASELINE, baseline_config(config))
    rebuilt = Rebuilt(area.origin, [], None)
    for stage, of in _order(stages, name):
        area.run(stage, of)
        if of != name:
            continue
        output = area.output(stage, of)
        chain = Lineage(run.name, area.origin, {stage: read_result(output.with_suffix(".json"))}, {stage: output})
        if stage in run.results:
            rebuilt.compared.append(_said(stage, run.results[stage]))
            found = stage_difference(stage, run.chain, chain)
        else:
            found = _other_input(run, stage, str(chain.results[stage]["output_hash"]))
        if found is not None:
            return replace(rebuilt, difference=found)
    _collect(area, run, name, folder / "result")
    return rebuilt


def _stages(run: TrackedRun, until: str) -> list[str]:
    """What is to be made: up to the last recorded stage, those between too that a run by hand took from elsewhere."""
    asked = MADE_AGAIN[: MADE_AGAIN.index(until) + 1]
    last = max((asked.index(stage) for stage in run.results if stage in asked), default=-1)
    baseline = (run.config.get("method") or {}).get("name") == BASELINE
    return [stage for stage in asked[: last + 1] if not baseline or stage in baseline_stages()]


def _other_input(run: TrackedRun, stage: str, made: str) -> Difference | None:
    """A stage that the run has no result of is known by what the stages after it took from it."""
    taken = {str(result["inputs"][stage]) for result in run.results.values() if stage in (result.get("inputs") or {})}
    return Difference(stage, "output", "hash", ", ".join(sorted(taken)), made) if taken - {made} else None


def _order(stages: list[str], name: str) -> list[tuple[str, str]]:
    """(stage, variant) in the order in which they are made; the float model is served and scored for what needs it."""
    order: list[tuple[str, str]] = []
    for stage in stages:
        if STAGES[stage].beside_float and name != BASELINE:
            order.append((stage, BASELINE))
        order.append((stage, name))
    return order


def _check_device(run: TrackedRun, stages: list[str]) -> None:
    for stage in stages:
        device = (run.results.get(stage, {}).get("environment") or {}).get("device")
        if device == "cuda" and detect_platform() != "cuda":
            raise UserError(f"{stage} was made on a GPU, and there is none here: another device gives other weights; give "
                            "from=cache")  # fmt: skip


def runnable(run: TrackedRun, stages: list[str], toolchains: Mapping[str, str | None]) -> dict[str, Any]:
    """A recorded configuration for this machine: the device that it was made on, and the interpreters that are here."""
    config, device = (
        run.config,
        next((run.results[stage]["environment"].get("device") for stage in stages if stage in run.results), None),
    )
    named = {name: toolchains.get(name) for name in config.get("toolchains") or {}}
    tracking = {**config["tracking"], "enabled": False}
    return {**config, "device": device or config["device"], "toolchains": named, "tracking": tracking}


def _collect(area: Worktree, run: TrackedRun, name: str, target: Path) -> None:
    target.mkdir()
    for stage in _wanted(run):
        output = area.output(stage, name)
        if output.is_dir():
            os.replace(output, target / stage)
            os.replace(output.with_suffix(".json"), target / f"{stage}.json")
    _write_run(run, target, area.origin)


def _write_run(run: TrackedRun, target: Path, how: str) -> None:
    write_json(target / "run.json", {"run_id": run.run_id, "variant": run.name, "config": run.config, "rebuilt": how})
