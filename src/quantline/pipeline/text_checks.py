"""What the stages will say of the texts of a configuration, asked of the stages' own functions before they run.

A text that is on this machine is read as calibrate, evaluate and tasks read it: too few samples, an empty row or a
conversation without a template is then said by `plan`. Large texts are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from quantline.config.method import BASELINE
from quantline.core.errors import ConfigError, UserError
from quantline.core.text import binary_size
from quantline.data.calibration import build
from quantline.data.windows import build_windows
from quantline.evaluation.tasks.run import local_items
from quantline.pipeline.config import Config
from quantline.pipeline.own_files import located
from quantline.planning.spec import Finding

# A MiB takes up to a second to tokenize.
READ_UP_TO_BYTES = 16 * 2**20


def text_checks(config: Config, root: Path, model: Path) -> list[Finding]:
    """What calibrate, evaluate and tasks say of the texts that are on this machine; a note for each that is too large.

    model: a folder with the model's config.json and tokenizer.
    """
    return [
        finding
        for option, paths, read in _reads(config, root, model)
        if (finding := _finding(option, [located(root, path) for path in paths], read, root))
    ]


def _reads(config: Config, root: Path, model: Path) -> Iterator[tuple[str, list[str], Callable[[], object]]]:
    """Option, paths of the texts that it names, and the function that reads them."""
    if config.method.name != BASELINE and config.calibration.sources:
        yield (
            "calibration.path",
            [one.path or "" for one in config.calibration.sources.values()],
            lambda: _calibrated(config, model),
        )
    yield "evaluate.path", [config.evaluate.path or ""], lambda: build_windows(model, config.evaluate)
    if config.tasks.any:
        yield "tasks.path", [config.tasks.path], lambda: local_items(config.tasks, root)


def _calibrated(config: Config, model: Path) -> None:
    with TemporaryDirectory(prefix="quantline-plan-") as folder:
        build(model, config.calibration, Path(folder) / "calibration")


def _finding(option: str, texts: list[Path], read: Callable[[], object], root: Path) -> Finding | None:
    if not all(text.is_file() for text in texts):
        return None  # on the hub, or missing, which is said by name
    size = sum(text.stat().st_size for text in texts)
    if size > READ_UP_TO_BYTES:
        fact = f"{option}: {binary_size(size)} of text are not read by plan, only by the stage"
        return Finding("text", "quantize", fact, refused=False)
    try:
        with chdir(root):
            read()
    except (UserError, ConfigError) as error:
        return Finding("text", "quantize", str(error))
    return None
