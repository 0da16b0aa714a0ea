"""The stages' common entrance: Hydra in front, errors without tracebacks behind.

A stage is a module with one function, `@stage("name")`, that is run as `python -m stages.name`. This package puts its own
checkout's src first on the path: with an editable install an experiment that DVC runs in a copy of the repository would
otherwise run the code of the repository it was copied from.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from quantline.pipeline.run import StageRun


# What each imported stage does, for stages that run others.
WORK: dict[str, Callable[[StageRun], None]] = {}


def stage(name: str) -> Callable[[Callable[[StageRun], None]], Callable[[], None]]:
    """Make a stage's function an entrypoint: composed configuration in, output and result out."""

    def decorate(work: Callable[[StageRun], None]) -> Callable[[], None]:
        def task(cfg: DictConfig) -> None:
            from hydra.core.hydra_config import HydraConfig

            run_and_publish(name, work, cfg, ROOT, list(HydraConfig.get().overrides.task))

        def entry() -> None:
            main(task, work.__code__.co_filename)

        WORK[name] = work
        return entry

    return decorate


def run_and_publish(
    name: str, work: Callable[[StageRun], None], cfg: DictConfig, root: Path, overrides: Sequence[str]
) -> None:
    """Run a stage, and publish what it measured when it was run by hand."""
    from quantline.pipeline.execute import run_stage

    config, result = run_stage(name, work, cfg, root, overrides)
    if result and config.frozen is None and config.tracking.enabled:
        from quantline.lifecycle.publish import publish_by_hand

        publish_by_hand(config, result["variant"], root)


def main(task: Callable[[DictConfig], Any], filename: str) -> None:
    """Run a Hydra task; a user's mistake ends in a message and an exit code, anything else in a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through to us
    os.environ.pop("HYDRA_MAIN_MODULE", None)
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    failures: list[int] = []

    # A failure must not end the other jobs of a sweep, and Hydra would print its own account of it.
    def guarded(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except Exception as error:
            failures.append(_report(error))

    # Hydra names the job and finds conf/ by the file in which its task was written: the stage's, not this one.
    guarded.__module__ = "__main__"
    guarded.__code__ = guarded.__code__.replace(co_filename=filename)
    try:
        import hydra

        hydra.main(version_base="1.3", config_path="../conf", config_name="config")(guarded)()
    except KeyboardInterrupt:
        print("interrupted; nothing half written was left", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "hydra":
            sys.exit("error: this Python has no hydra; run `make setup`, then `source .venv/bin/activate`")
        sys.exit(_report(error))
    if failures:
        sys.exit(failures[0])


def own_main(
    task: Callable[[DictConfig, dict[str, str]], Any], names: Sequence[str], usage: str, filename: str, argv: list[str]
) -> None:
    """Run a task that takes options of its own, `names`, beside the configuration's."""
    from quantline.core.errors import UserError
    from quantline.pipeline.command_line import split_own

    if "--help" in argv or "-h" in argv:
        print(usage)
    try:
        own, argv[1:] = split_own(argv[1:], names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    main(lambda cfg: task(cfg, own), filename)


def _report(error: Exception) -> int:
    """Print what a user should read of a failure; a fault of ours keeps its traceback."""
    from quantline.pipeline.user_messages import explain

    explained = explain(error, ROOT / "conf")
    if explained is None:
        traceback.print_exception(error)
        return 70  # EX_SOFTWARE
    print(f"error: {explained[0]}", file=sys.stderr)
    return explained[1]


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
