"""A variant's lineage: the results of its stages in order, and the folders of their outputs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.pipeline.inputs import command_for
from quantline.pipeline.paths import (
    PIPELINE_HOME,
    SAVED,
    Taken,
    not_among,
    read_result,
    recorded,
    run_folder,
    run_names,
    taken,
)
from quantline.pipeline.stages import PIPELINE, STAGES


@dataclass(frozen=True)
class Lineage:
    """The lineage of one variant.

    name: for display. origin: where it was read from. results: by stage, in the pipeline's order. folders: the outputs
    that are on this disk, by stage. remedy: from the name of a stage to how it is made again.
    """

    name: str
    origin: str
    results: dict[str, dict[str, Any]]
    folders: dict[str, Path] = field(default_factory=dict)
    remedy: Callable[[str], str] = lambda stage: ""

    def broken(self) -> list[str]:
        """Faults of the lineage: stages that were made from another output than the one in the lineage."""
        faults = []
        for stage, result in self.results.items():
            for took, content in taken(result).items():
                other = None if took.baseline else self.results.get(took.stage)
                if other is not None and took.content(other) != content:
                    fact = f"{stage} was made from another output of {took.stage} than the current one"
                    faults.append(fact + self.remedy(stage))
        return faults


def ordered(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by stage, in the pipeline's order, without stages outside of the pipeline."""
    by_stage = {str(result.get("stage")): result for result in results}
    return {stage: by_stage[stage] for stage in PIPELINE if stage in by_stage}


def local_lineage(root: Path, name: str) -> Lineage | None:
    """The lineage of a variant of the pipeline, or with `by-hand/NAME` of a manual run; None if there is none."""
    folder = run_folder(root, name)
    if folder is None or not any((folder / f"{stage}.json").is_file() for stage in PIPELINE):
        return None
    return _folder_chain(folder, root, name, folder.relative_to(root).as_posix())


def folder_lineage(path: Path, root: Path) -> Lineage | None:
    """The lineage of a folder of results, a result file or an output folder; None if it is none of these."""
    for folder in (path, path.parent):
        if any((folder / f"{stage}.json").is_file() for stage in PIPELINE) and (
            folder == path or path.stem in PIPELINE
        ):
            return _folder_chain(folder, root, folder.name, str(folder))
    return None


def _folder_chain(folder: Path, root: Path, name: str, origin: str) -> Lineage:
    paths = {stage: folder / f"{stage}.json" for stage in PIPELINE if (folder / f"{stage}.json").is_file()}
    results = {stage: read_result(path) for stage, path in paths.items()}
    # Shared outputs, and inputs that were found by fingerprint in another variant's folder, are found by content.
    for stage in reversed(PIPELINE):
        for took, content in taken(results.get(stage, {})).items():
            # Of a file that not all options of its stage decide, equal ones are in outputs of other options, too.
            shared = took.file in STAGES[took.stage].decide if took.stage in STAGES else True
            if took.stage not in results and not took.baseline and not shared:
                path = _by_content(root, took, content)
                if path is not None:
                    paths[took.stage], results[took.stage] = path, read_result(path)
    folders = {stage: path.with_suffix("") for stage, path in paths.items() if path.with_suffix("").is_dir()}
    return Lineage(name, origin, ordered(results.values()), folders, _remedy(folder, root))


def _remedy(folder: Path, root: Path) -> Callable[[str], str]:
    if (folder / SAVED).is_file():
        overrides = shlex.split(str(read_json(folder / SAVED)["overrides"]))
        return lambda stage: f"; run: {command_for(stage, overrides)}"
    return lambda stage: "; run `dvc repro`" if folder.is_relative_to(root / PIPELINE_HOME) else ""


def _by_content(root: Path, took: Taken, content: str) -> Path | None:
    return next((path for path in recorded(root, took.stage) if took.content(read_result(path)) == content), None)


def require_lineage(chain: Lineage | None, given: str, root: Path) -> Lineage:
    """Return the lineage if there is one.

    Raises:
        UserError: there is none; the message lists the variants.
    """
    if chain is not None and chain.results:
        return chain
    known = not_among(given, run_names(root, *PIPELINE))
    raise UserError(f"{given}: {known}; a folder of results or the id of a run in MLflow is allowed, too")


def as_values(chain: Lineage) -> dict[str, Any]:
    """The lineage as plain values, for JSON."""
    return {
        "variant": chain.name, "origin": chain.origin, "faults": chain.broken(),
        "stages": [_link(result) for result in chain.results.values()],
    }  # fmt: skip


def _link(result: Mapping[str, Any]) -> dict[str, Any]:
    environment = dict(result.get("environment") or {})
    return {
        **{key: result.get(key) for key in ("stage", "fingerprint", "identity", "status", "reason", "inputs")},
        "output_hash": result.get("output_hash"), "outputs": result.get("outputs"), "tensors": result.get("tensors"),
        "environment": environment, "timings": result.get("timings"), "metrics": result.get("metrics"),
    }  # fmt: skip
