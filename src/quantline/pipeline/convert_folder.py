"""The convert stage on a folder that the user names: nothing of the pipeline goes in, nothing of it comes out."""

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
    """The serving target that the environments' locks name."""
    return Target("vllm", locked_version(root, "vllm", device), device, config.serve.dtype)


def convert_folder(run: StageRun, serving: Target) -> None:
    """Convert `source.path` to `out`, or to the stage's place below scratch/, and print what the proof says.

    Raises:
        UserError: `out` holds something, or lies within the source; whatever speaks against the conversion.
    """
    config = run.config
    if run.frozen:
        raise UserError(f"source={config.source.kind}: is for runs by hand; a variant converts what it has quantized")
    run.detached = True
    source = Path(str(config.source.path)).expanduser()
    out = Path(config.out).expanduser() if config.out else run.paths.output
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out}: is there and not an empty folder; remove it, or name another")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"out={out}: lies within source.path={source}; name a folder beside it")
    with building(out) as partial:
        proof = convert(source, partial, config.convert, kind=config.source.kind, serving=serving)
    for line in [*proof.summary(), *(f"  note: {warning}" for warning in proof.warnings), f"convert -> {out}"]:
        print(line, file=sys.stderr)
