"""Finds the outputs of earlier stages, the inputs of a stage."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE, FloatMethod
from quantline.core.errors import UserError
from quantline.core.text import listed
from quantline.pipeline.config import Config
from quantline.pipeline.identity import options_fingerprint, stage_fingerprint
from quantline.pipeline.paths import PIPELINE_HOME, read_result, recorded, stage_paths, taken
from quantline.pipeline.stages import STAGES, baseline_overrides, before, is_baseline, needed


@dataclass(frozen=True)
class Wanted:
    """The output of a stage, of the variant or of its float baseline.

    outdated: where an output of the same options is that other code made, relative to the checkout; None if there is none.
    """

    stage: str
    baseline: bool = False
    outdated: str | None = None

    def __str__(self) -> str:
        """Its name in a message."""
        return f"{self.stage} of the float model" if self.baseline else self.stage


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


def _of_any_code(root: Path, config: Config, stage: str) -> dict[str, Path]:
    """The outputs of a stage with these options, whatever code made them and what they were made from.

    Each is there by its fingerprint and by its content: what an output was made from may have been made again since.
    Everything that an output was made from is compared, not only the stages directly before it, because outputs that say
    nothing have equal content: those of serve_smoke for any two variants that this machine cannot serve.
    """
    found: dict[str, dict[str, Path]] = {}

    def outputs(name: str) -> dict[str, Path]:
        if name not in found:
            found[name] = {}
            options = options_fingerprint(config, name, root)
            for path in recorded(root, name):
                result = read_result(path)
                if result.get("options") == options and of_this(result, set(before(config, name))):
                    hashes = (result["fingerprint"], result["output_hash"], *result.get("outputs", {}).values())
                    found[name].update(dict.fromkeys(hashes, path.with_suffix("")))
        return found[name]

    def of_this(result: dict[str, Any], earlier: set[str]) -> bool:
        made_from = result.get("identity", {}).get("before", {})
        contents = {took.stage: content for took, content in taken(result).items() if not took.baseline}
        return made_from.keys() == earlier and all(
            made_from.get(name) in outputs(name) or contents.get(name) in outputs(name)
            for name in earlier | (contents.keys() & STAGES.keys())
        )

    return outputs(stage)


def command_for(stage: str, overrides: Sequence[str], *, baseline: bool = False) -> str:
    """The command that runs a stage manually, with the options of a run or those of its float baseline."""
    if baseline:
        overrides = [f"method={BASELINE}", *baseline_overrides(overrides)]
    return shlex.join(["python", "-m", f"stages.{stage}", *overrides])


def missing_inputs(root: Path, stage: str, asked: Wanted, config: Config) -> list[Wanted]:
    """What a manual run of `stage` still needs, with the stages that make it, in the order in which they can run.

    asked: the input that it asked for and that is not there.
    """
    missing: dict[str, Wanted] = {}

    def need(name: str, *, baseline: bool) -> None:
        of = float_config(config) if baseline else config
        fingerprint = stage_fingerprint(of, name, root)
        if fingerprint in missing or output_with_fingerprint(root, name, fingerprint) is not None:
            return
        for earlier in needed(of, name):
            need(earlier, baseline=baseline)
        if STAGES[name].beside_float and not is_baseline(of):
            need(name, baseline=True)
        old = next((path for path in _of_any_code(root, of, name).values() if path.is_dir()), None)
        place = old.relative_to(root).as_posix() if old else None
        missing[fingerprint] = Wanted(name, baseline and not STAGES[name].shared, place)

    need(asked.stage, baseline=asked.baseline)
    if stage in STAGES and not STAGES[stage].by_hand:
        for name in needed(config, stage):
            need(name, baseline=False)
        if STAGES[stage].beside_float and not is_baseline(config):
            need(stage, baseline=True)
    return list(missing.values())


def advice(stage: str, missing: Sequence[Wanted], overrides: Sequence[str]) -> str:
    """The message of a manual run whose inputs are missing, with the commands that make them."""
    commands = [command_for(wanted.stage, overrides, baseline=wanted.baseline) for wanted in missing]
    old = [str(wanted.outdated) for wanted in missing if wanted.outdated]
    if len(missing) == 1:
        fact = f"was made by other code ({old[0]}); run it again" if old else "does not exist for these options; run"
        return f"{stage} needs the output of {missing[0]}, which {fact}: {commands[0]}"
    lines = "".join(f"\n  {command}" for command in commands)
    outputs = listed([str(wanted) for wanted in missing])
    fact = "do not exist for these options; run in this order"
    if len(old) == len(missing):
        fact = f"were made by other code ({listed(old)}); run them again in this order"
    elif old:
        were = "were" if len(old) > 1 else "was"
        fact = f"do not exist for these options ({listed(old)} {were} made by other code); run in this order"
    return f"{stage} needs the outputs of {outputs}, which {fact}:{lines}"


def float_config(config: Config) -> Config:
    """The baseline's configuration: the same model, serving and evaluation, without quantization."""
    return config.model_copy(update={"method": FloatMethod(name="float")})
