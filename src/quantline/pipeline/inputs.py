"""Finds the outputs of earlier stages, the inputs of a stage."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from quantline.config.method import BASELINE, FloatMethod
from quantline.core.errors import UserError
from quantline.pipeline.config import Config
from quantline.pipeline.paths import PIPELINE_HOME, read_result, recorded, stage_paths
from quantline.pipeline.stages import baseline_overrides


def pipeline_output(root: Path, variant: str, stage: str) -> Path:
    """The output of a stage that DVC ran.

    Raises:
        UserError: it is not there.
    """
    places = stage_paths(root / PIPELINE_HOME, variant, stage)
    if not places.output.is_dir() or not places.result.is_file():
        raise UserError(f"{places.output.relative_to(root)} is missing; run `dvc repro` to make it")
    return places.output


def output_with_fingerprint(root: Path, stage: str, fingerprint: str) -> Path | None:
    """The output of a stage with this fingerprint, from a manual run or the pipeline; None if there is none."""
    for result in recorded(root, stage):
        output = result.with_suffix("")
        if output.is_dir() and read_result(result).get("fingerprint") == fingerprint:
            return output
    return None


def command_for(stage: str, overrides: Sequence[str], *, baseline: bool = False) -> str:
    """The command that runs a stage manually, with the options of a run or those of its float baseline."""
    if baseline:
        overrides = [f"method={BASELINE}", *baseline_overrides(overrides)]
    return shlex.join(["python", "-m", f"stages.{stage}", *overrides])


def float_config(config: Config) -> Config:
    """The baseline's configuration: the same model, serving and evaluation, without quantization."""
    return config.model_copy(update={"method": FloatMethod(name="float")})
