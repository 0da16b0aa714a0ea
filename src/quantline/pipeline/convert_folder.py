"""The convert stage for a folder that the user names; it neither reads nor writes outputs of the pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quantline.conversion.convert import convert
from quantline.core.errors import UserError
from quantline.core.files import building
from quantline.pipeline.config import Config
from quantline.serving.rules import Target
from quantline.toolchains.environments import locked_version

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


def serving_target(config: Config, root: Path, device: str) -> Target:
    """The serving target, with the version in the environment's lock file."""
    return Target("vllm", locked_version(root, "vllm", device), device, config.serve.dtype)


def convert_folder(run: StageRun, serving: Target) -> None:
    """Convert `source.path` to `out`, or to the stage's folder below scratch/, and print a summary of the proof.

    Raises:
        UserError: `out` is not empty or lies within the source, or the conversion is refused.
    """
    config = run.config
    if run.frozen:
        raise UserError(f"source={config.source.kind}: is for manual runs; a variant converts its own checkpoint")
    run.detached = True
    source = Path(str(config.source.path)).expanduser()
    out = Path(config.out).expanduser() if config.out else run.paths.output
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out}: exists and is not an empty folder; remove it or give another folder")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"out={out}: lies within source.path={source}; give a folder outside of it")
    with building(out) as partial:
        proof = convert(source, partial, config.convert, kind=config.source.kind, serving=serving)
    for line in [*proof.summary(), *(f"  note: {warning}" for warning in proof.warnings), f"convert -> {out}"]:
        print(line, file=sys.stderr)
