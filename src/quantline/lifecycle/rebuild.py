"""Rebuild a variant from its MLflow run: from DVC's cache or a remote, or by running its stages again.

Everything is verified against the run's recorded hashes: each file and tensor of the outputs, and the metrics of the
evaluation. The result appears in its folder only if it is complete and identical.
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
from quantline.core.files import partial, write_json
from quantline.lifecycle.storage.dvc_cache import require_remote
from quantline.lifecycle.storage.dvc_outputs import fetch_outputs, outputs_of
from quantline.lifecycle.tracking.reader import TrackedRun
from quantline.lifecycle.worktree import Worktree, baseline_config, make_worktree
from quantline.pipeline.dvc_config import dvc_config
from quantline.pipeline.hashing import hash_folder
from quantline.pipeline.identity import combined
from quantline.pipeline.lineage.chain import Lineage
from quantline.pipeline.lineage.diff import MISSING, Difference, outcome_difference, stage_difference
from quantline.pipeline.paths import read_result, taken
from quantline.pipeline.stages import STAGES, baseline_stages, names
from quantline.toolchains.environments import detect_platform

MADE_AGAIN = names(lambda stage: stage.rebuilt)


@dataclass(frozen=True)
class Rebuilt:
    """The outcome. how: the source. compared: the compared stages. difference: None if it is identical."""

    how: str
    compared: list[str]
    difference: Difference | None


@dataclass(frozen=True)
class RebuildOptions:
    """How a variant is rebuilt from source.

    until: the last stage. toolchains: interpreters on this machine that replace its environments; those in the run belong
    to another machine. trust_patch: apply the run's patch, which is code from the tracking server.
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
    """Rebuild a variant in `out`: one folder per stage (`convert` is the checkpoint), and the results.

    Args:
        run: the variant's run in MLflow.
        out: a folder that does not exist; made only if everything is identical.
        root: the checkout.
        source: `cache`, `source`, or `auto`, which uses the source if the cache does not have it.
        remote: DVC remote to read; null is the default remote.
        making: how it is rebuilt from source.

    Raises:
        UserError: it is not in the cache, its code or model is not available, or `out` exists.
    """
    if out.exists():
        raise UserError(f"out={out}: already exists; give a new folder")
    if remote is not None:
        require_remote(dvc_config(root), remote)
    making = making or RebuildOptions()
    with partial(out) as folder:
        missing: list[str] = []
        if source != "source":
            missing, rebuilt = _from_cache(run, folder, root, remote)
            if missing and source == "cache":
                where = " on a machine with a GPU" if _gpu_stage(run, _stages(run, making.until)) else ""
                raise UserError(
                    f"{run.name} is not in DVC's cache: {'; '.join(missing)}; give from=source{where} to rebuild it"
                )
            for reason in missing:
                print(f"not from the cache: {reason}", file=sys.stderr, flush=True)
        if source == "source" or missing:
            rebuilt = _from_source(run, folder, root, making, cached=not missing)
        if rebuilt.difference is None:
            os.replace(folder / "result", out)
    return rebuilt


def _is_baseline(run: TrackedRun) -> bool:
    return (run.config.get("method") or {}).get("name") == BASELINE


def _wanted(run: TrackedRun) -> list[str]:
    return [stage for stage in run.results if stage in MADE_AGAIN and (_is_baseline(run) or STAGES[stage].kept)]


def _from_cache(run: TrackedRun, folder: Path, root: Path, remote: str | None) -> tuple[list[str], Rebuilt]:
    target, outs = folder / "result", {}
    for stage in _wanted(run):
        for name, out in outputs_of(run.lock, stage).items():
            outs[target / name] = out
    rebuilt = Rebuilt("DVC's cache", [], None)
    if lost := [stage for stage in _wanted(run) if not outputs_of(run.lock, stage)]:
        return [
            f"its run has no outputs in DVC of {', '.join(lost)}: it was run manually, or published while dvc.lock lacked "
            "them"
        ], rebuilt
    target.mkdir()
    try:
        missing = fetch_outputs(root, outs, remote)
    except UserError as error:  # no DVC here; the sources may do
        missing = [str(error)]
    if missing:
        shutil.rmtree(target)
        return missing, rebuilt
    for stage in [stage for stage in _wanted(run) if (target / stage).is_dir()]:
        result = read_result(target / f"{stage}.json")
        chain = Lineage(run.name, "DVC's cache", {stage: _measured(result, target / stage)}, {stage: target / stage})
        found = outcome_difference(stage, run.chain, chain, exact=True)
        rebuilt.compared.append(_counts(stage, run.results[stage]))
        if found is not None:
            return [], replace(rebuilt, difference=found)
    _write_run(run, target, "DVC's cache")
    return [], rebuilt


def _measured(result: dict[str, Any], output: Path) -> dict[str, Any]:
    """A result with the hashes of the current files instead of the recorded hashes."""
    hashes = hash_folder(output)
    return {**result, "outputs": hashes.files, "tensors": hashes.tensors, "output_hash": combined(hashes.files)}


def _counts(stage: str, result: dict[str, Any]) -> str:
    parts = [
        f"{len(result.get('outputs') or {})} files" if STAGES[stage].exact else f"{len(result['metrics'])} metrics"
    ]
    if STAGES[stage].exact and result.get("tensors"):
        parts.append(f"{len(result['tensors'])} tensors")
    return f"{stage} ({', '.join(parts)})"


def _from_source(run: TrackedRun, folder: Path, root: Path, making: RebuildOptions, *, cached: bool) -> Rebuilt:
    """cached: whether the cache may have it, and can be advised."""
    stages = _stages(run, making.until)
    if stage := _gpu_stage(run, stages):
        remedy = "give from=cache" if cached else "rebuild it on a machine with one"
        raise UserError(
            f"{stage} was made on a GPU, and this machine has none: other devices give other weights; {remedy}"
        )
    code = {
        stage: run.results[stage]["identity"]["code"] for stage in stages if "identity" in run.results.get(stage, {})
    }
    if not code:
        remedy = "give from=cache" if cached else "it cannot be rebuilt from source; quantize it again"
        raise UserError(f"run {run.run_id}: was published by a version that did not record the code; {remedy}")
    area = make_worktree(
        folder / "work", root, commit=run.commit, patch=run.patch, code=code, trust_patch=making.trust_patch
    )
    print(f"rebuilding from {area.origin}", file=sys.stderr, flush=True)
    name = BASELINE if _is_baseline(run) else run.name.rpartition("/")[2]
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
            rebuilt.compared.append(_counts(stage, run.results[stage]))
            found = stage_difference(stage, run.chain, chain)
        else:
            found = _other_input(run, stage, chain.results[stage])
        if found is not None:
            return replace(rebuilt, difference=found)
    _collect(area, run, name, folder / "result")
    return rebuilt


def _stages(run: TrackedRun, until: str) -> list[str]:
    """The stages to run: up to the last recorded one, with those in between that a manual run took from another run."""
    candidates = MADE_AGAIN[: MADE_AGAIN.index(until) + 1]
    last = max((candidates.index(stage) for stage in run.results if stage in candidates), default=-1)
    return [stage for stage in candidates[: last + 1] if not _is_baseline(run) or stage in baseline_stages()]


def _other_input(run: TrackedRun, stage: str, made: Mapping[str, Any]) -> Difference | None:
    """The difference of a stage without a result in the run: what later stages took of it is recorded, by its hash."""
    for result in run.results.values():
        for took, content in taken(result).items():
            if took.stage == stage and not took.baseline and took.content(made) != content:
                return Difference(stage, "output", took.file or "hash", content, took.content(made) or MISSING)
    return None


def _order(stages: list[str], name: str) -> list[tuple[str, str]]:
    """(stage, variant) in the order in which they run; the float model comes first where a stage compares with it."""
    order: list[tuple[str, str]] = []
    for stage in stages:
        if STAGES[stage].beside_float and name != BASELINE:
            order.append((stage, BASELINE))
        order.append((stage, name))
    return order


def _gpu_stage(run: TrackedRun, stages: list[str]) -> str | None:
    """The first stage that was made on a GPU, where this machine has none."""
    devices = {stage: (run.results.get(stage, {}).get("environment") or {}).get("device") for stage in stages}
    made = [stage for stage, device in devices.items() if device == "cuda"]
    return made[0] if made and detect_platform() != "cuda" else None


def runnable(run: TrackedRun, stages: list[str], toolchains: Mapping[str, str | None]) -> dict[str, Any]:
    """A recorded configuration for this machine: with the recorded device and the interpreters of this machine."""
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
