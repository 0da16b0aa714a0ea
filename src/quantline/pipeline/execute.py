"""Runs a stage: checks the configuration, does the work, writes the result."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.core.files import clear, release, write_json
from quantline.core.text import alternatives
from quantline.pipeline.config import Config, parse
from quantline.pipeline.fit import refuse_what_the_model_does_not_take
from quantline.pipeline.hydra_values import plain
from quantline.pipeline.identity import stage_fingerprint
from quantline.pipeline.inputs import Wanted, float_config, missing_inputs, output_with_fingerprint
from quantline.pipeline.kept_servers import make_room
from quantline.pipeline.monitor.monitor import Monitor
from quantline.pipeline.paths import SAVED, read_result, stage_paths
from quantline.pipeline.run import StageRun, stage_paths_of
from quantline.pipeline.stages import STAGES, baseline_overrides, is_baseline, names
from quantline.pipeline.told import told
from quantline.toolchains.environments import usable_platform

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from quantline.pipeline.run import StageRun

# A server and the evaluation compare the lengths with the model in hand by themselves.
_BEFORE_SERVING = (*names(lambda stage: stage.exact), "noise")


def execute(
    stage: str, work: Callable[[StageRun], None], config: Config, root: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Run one stage from a validated configuration and return its result."""
    started_at = time.time()
    run = StageRun(stage, config, root, tuple(overrides))
    places = run.paths  # before the work: it refuses a name that is not valid
    removed = clear(places.output.parent)  # also of other stages: DVC may take their outputs from its run cache
    if any(path.name.startswith(f".{places.output.name}.") for path in removed):
        anew = "goes on where its backend can" if stage == "quantize" else "starts anew"
        print(f"  note: a former run of {stage} was killed before it ended; this one {anew}", file=sys.stderr)
    if run.frozen:
        make_room(stage, stage_paths(run.home, run.variant, "download").output / "model")
    try:
        with Monitor() as monitor:
            work(run)
            run.monitor = {} if run.detached else monitor.finish()
    finally:
        # An interrupt can arrive while a `with` block is being entered; its cleanup does not run then.
        release(places.output)
    if run.detached:
        return {}
    try:
        result = run.write_result(started_at)
    except BaseException:
        shutil.rmtree(places.output, ignore_errors=True)  # an output without its result is not usable
        raise
    if not run.frozen:
        saved = {"config": config.model_dump(exclude={"frozen"}), "overrides": shlex.join(overrides)}
        write_json(run.home / run.variant / SAVED, saved)
    where = places.output.relative_to(root)
    name = places.output.parent.relative_to(run.home)
    print(f"{stage} {name}: {run.status} in {result['timings']['total_seconds']:.1f} s -> {where}", file=sys.stderr)
    if shown := told(stage, run.metrics, refused=run.status != "ok"):
        print(f"  {shown}", file=sys.stderr)
    for warning in run.warnings + ([run.reason] if run.reason else []):
        print(f"  note: {warning}", file=sys.stderr)
    return result


def made(config: Config, variant: str, work: Mapping[str, Callable[[StageRun], None]], root: Path) -> tuple[Path, str]:
    """The converted checkpoint of a manually run variant, and its hash; only stages that are out of date run again.

    Args:
        config: of the variant.
        variant: name of its folder in scratch/.
        work: the functions of calibrate, quantize and convert, by name.
        root: the checkout.
    """
    named, output = config.model_copy(update={"variant": variant}), root
    for stage in names(lambda stage: stage.exact and not stage.shared):
        run = StageRun(stage, named, root, ())
        output = run.paths.output
        result = read_result(run.paths.result) if run.paths.result.is_file() else {}
        if result.get("fingerprint") != run.fingerprint or not output.is_dir():
            execute(stage, work[stage], named, root, ())
    return output, str(read_result(stage_paths_of(output).result)["output_hash"])


def seeded(config: Config, seed: int) -> Config:
    """The same variant with another seed, which also selects other calibration samples."""
    calibration = config.calibration.model_copy(update={"seed": seed})
    return config.model_copy(update={"seed": seed, "calibration": calibration})


def run_stage(
    name: str, work: Callable[[StageRun], None], cfg: DictConfig, root: Path, overrides: Sequence[str]
) -> tuple[Config, dict[str, Any]]:
    """Validate the configuration and run the stage; returns the configuration and the result ({} if none is written)."""
    config = parse(plain(cfg))
    check_caller(config, overrides)
    return config, run_checked(name, work, config, root, overrides)


def run_checked(
    name: str, work: Callable[[StageRun], None], config: Config, root: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Check what can be known before the stage computes, then run it; returns the result ({} if none is written)."""
    if STAGES[name].locks:
        usable_platform(config.device)  # before anything is read, installed or computed
    if config.frozen is None and config.source.kind == "pipeline" and name in _BEFORE_SERVING:
        refuse_what_the_model_does_not_take(
            config, root, _downloaded(config, root)
        )  # as `compose` does for the pipeline
    if name in ("calibrate", "quantize") and not is_baseline(config):
        # Here, not in the stage: a change of the planning code should not make DVC quantize again. The calibration is the
        # first stage that finds a model of the hub.
        from quantline.pipeline.preflight import preflight

        for note in preflight(StageRun(name, config, root, tuple(overrides))):
            if name == "quantize":
                print(f"  note: {note}", file=sys.stderr)
    return execute(name, work, config, root, overrides)


def _downloaded(config: Config, root: Path) -> Path | None:
    """The model that is downloaded for a configuration; None if it is not."""
    output = output_with_fingerprint(root, "download", stage_fingerprint(config, "download", root))
    return output / "model" if output else None


def run_until(
    until: str, work: Mapping[str, Callable[[StageRun], None]], config: Config, root: Path, overrides: Sequence[str]
) -> list[str]:
    """Run by hand what is missing up to a stage, in order; returns the names of the runs that have new results.

    Args:
        until: the last stage.
        work: the functions of the stages, by name.
        config: of the variant.
        root: the checkout.
        overrides: of the variant, as typed.

    Raises:
        UserError: a stage refuses the variant. What ran before it stays. Or the float baseline does not have that stage.
    """
    of_float = names(lambda stage: stage.shared or bool(stage.beside_float))
    if is_baseline(config) and until not in of_float:
        allowed = alternatives(of_float)
        raise UserError(f"until={until}: the float baseline skips it; give until={allowed}, or another method")
    missing = missing_inputs(root, until, Wanted(until), config)
    ran: dict[str, None] = {}
    for number, wanted in enumerate(missing, 1):
        own, words = config, overrides
        if wanted.baseline:
            own = float_config(config).model_copy(update={"variant": None})
            words = [f"method={BASELINE}", *baseline_overrides(overrides)]
        print(f"\n[{number}/{len(missing)}] {wanted}", file=sys.stderr, flush=True)
        run_checked(wanted.stage, work[wanted.stage], own, root, words)
        ran[StageRun(wanted.stage, own, root, tuple(words)).variant] = None
    return list(ran)


def check_caller(config: Config, overrides: Sequence[str]) -> None:
    """Refuse a run whose output would not match its configuration.

    Raises:
        UserError: a frozen configuration with overrides, or DVC runs a stage from a configuration that is not frozen.
    """
    if config.frozen is not None and overrides:
        raise UserError(
            f"{' '.join(overrides)}: variants/{config.frozen.variant}.yaml is frozen and takes no overrides; edit the "
            "variant's line in params.yaml, or run the stage without -cp and -cn"
        )
    if config.frozen is None and os.environ.get("DVC_STAGE"):
        raise UserError(
            "DVC runs this stage from a configuration that is not frozen; run it with -cp ../variants -cn NAME"
        )
