"""The common entrypoint of stages and commands: runs Hydra, and prints errors without tracebacks.

A stage is a module with one function, `@stage("name")`, that runs as `python -m stages.name`. This package puts its own
checkout's src first on the path. Otherwise, with an editable install, an experiment that DVC runs in a copy of the
repository would run the code of the original repository.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

_HERE = Path(__file__).resolve().parent.parent


def _project() -> Path:
    """The checkout of this file; for an installed package the project that the current folder is in."""
    if (_HERE / "src" / "quantline").is_dir():
        return _HERE
    around = (Path.cwd(), *Path.cwd().parents)
    return next((folder for folder in around if (folder / "conf" / "config.yaml").is_file()), Path.cwd())


ROOT = _project()
CONF = ROOT / "conf"
if _HERE == ROOT:
    sys.path.insert(0, str(ROOT / "src"))

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from quantline.pipeline.command_line import Option
    from quantline.pipeline.run import StageRun


# The functions of the imported stages, for stages that run others.
WORK: dict[str, Callable[[StageRun], None]] = {}


def stage(name: str) -> Callable[[Callable[[StageRun], None]], Callable[[], None]]:
    """Turn a stage's function into an entrypoint, which composes the configuration and writes output and result."""

    def decorate(work: Callable[[StageRun], None]) -> Callable[[], None]:
        def task(cfg: DictConfig) -> None:
            from hydra.core.hydra_config import HydraConfig

            run_and_publish(name, work, cfg, ROOT, list(HydraConfig.get().overrides.task))

        def entry() -> None:
            main(task, work.__code__.co_filename, about=sys.modules[work.__module__].__doc__)

        WORK[name] = work
        return entry

    return decorate


def run_and_publish(
    name: str, work: Callable[[StageRun], None], cfg: DictConfig, root: Path, overrides: Sequence[str]
) -> None:
    """Run a stage, and publish the result of a manual run."""
    from quantline.pipeline.execute import run_stage

    config, result = run_stage(name, work, cfg, root, overrides)
    if result and config.frozen is None and config.tracking.enabled:
        from quantline.lifecycle.publish import publish_by_hand

        publish_by_hand(config, result["variant"], root)


def main(
    task: Callable[..., Any], filename: str, options: Sequence[Option] = (), about: str | None = None,
    reads: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Run a command that takes the pipeline's configuration; see `command_line` for its error handling.

    task: takes the configuration, and the values of `options` if there are any. filename: of the command's module. reads:
    the keys of the configuration that it reads, for --help; None for a stage, whose keys are in the table of stages.
    """
    from quantline.core.secrets import hide_requests
    from quantline.pipeline.command_line import ending, read, report
    from quantline.pipeline.overrides import refuse_repeated, with_home

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions reach this function
    os.environ.pop("HYDRA_MAIN_MODULE", None)
    failures: list[int] = []
    with ending(CONF):
        _inform(filename, about, options, configured=True, reads=reads)
        arguments: dict[str, str | None] = {}
        if "--help=all" in sys.argv:
            sys.argv[1:] = ["--help"]
        else:
            arguments, sys.argv[1:] = read(sys.argv[1:], options, configured=True)
            refuse_repeated(sys.argv[1:])
            sys.argv[1:] = with_home(sys.argv[1:])
        given = [arguments] if options else []

        # A failure must not end the other jobs of a sweep, and Hydra would print its own traceback.
        def guarded(cfg: DictConfig) -> None:
            try:
                hide_requests()
                _head_job()
                task(cfg, *given)
            except Exception as error:
                failures.append(report(error, CONF))

        # Hydra derives the job's name and the path of conf/ from the task's source file, which must be the stage's.
        guarded.__module__ = "__main__"
        guarded.__code__ = guarded.__code__.replace(co_filename=filename)
        _place_configurations()
        import hydra

        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(guarded)()
    if failures:
        sys.exit(failures[0])


def command(
    task: Callable[[dict[str, str | None]], int | None], options: Sequence[Option] = (), about: str | None = None
) -> NoReturn:
    """Run a command without a configuration: `task` takes the values of `options` and returns the exit code."""
    from quantline.pipeline.command_line import ending, read

    with ending(CONF):
        _inform(task.__code__.co_filename, about, options, configured=False)
        sys.exit(task(read(sys.argv[1:], options, configured=False)[0]))
    raise AssertionError("unreachable")


def _place_configurations() -> None:
    """Check that there is a project, and let `-cp ../variants` mean a folder of it, wherever this package lies.

    Raises:
        UserError: there is no project here.
    """
    from quantline.core.errors import UserError

    if not (CONF / "config.yaml").is_file():
        raise UserError(
            f"{ROOT}: is no Quantline project, and in none; make one with `quantline init to=DIR`, and go there"
        )
    for place, argument in enumerate(sys.argv[:-1]):
        if argument in ("-cp", "--config-path"):
            sys.argv[place + 1] = os.path.normpath(ROOT / "stages" / sys.argv[place + 1])


def _inform(
    filename: str, about: str | None, options: Sequence[Option], *, configured: bool, reads: Sequence[str] | None = None
) -> None:
    """Answer --help and --version, and end."""
    from quantline.pipeline.command_line import help_asked

    name = Path(filename).stem
    if "--version" in sys.argv:
        from quantline import __version__

        print(f"quantline {__version__}")
        sys.exit(0)
    if help_asked(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
        from quantline.pipeline.usage import usage

        if configured and reads is None:
            from quantline.pipeline.stages import STAGES

            reads = [key for key in STAGES[name].reads if not key.startswith("frozen.")]
        print(usage(f"{_typed()}{name}", about, options, reads=reads, conf=CONF, arguments=sys.argv[1:]))
        sys.exit(0)


def _typed() -> str:
    """How commands are started here: by the console command, or as modules."""
    return "quantline " if Path(sys.argv[0]).name == "quantline" else "python -m stages."


def _head_job() -> None:
    """Print a heading for a job of --multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        print(f"\n== {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)}", file=sys.stderr, flush=True)
