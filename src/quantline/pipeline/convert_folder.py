"""The convert stage for a folder that the user names; it neither reads nor writes outputs of the pipeline."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.layouts.choice import runtime_of
from quantline.conversion.architecture import LABEL, MODULE, RunWorker
from quantline.conversion.convert import convert
from quantline.conversion.from_gguf import KIND, restore_float
from quantline.core.errors import UserError
from quantline.core.files import building
from quantline.pipeline.config import Config
from quantline.serving.rules import Target
from quantline.toolchains import environments
from quantline.toolchains.environments import expected_version
from quantline.toolchains.protocol import JobResult
from quantline.toolchains.runner import run_worker

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


def serving_target(config: Config, root: Path, device: str) -> tuple[Target, list[str]]:
    """The serving target, and notes on what is only assumed of it."""
    runtime = runtime_of(config.method.name) if config.source.kind == "pipeline" else "vllm"
    version, note = expected_version(root, runtime, device, python=config.toolchains.get(runtime))
    return Target(runtime, version, device, config.serve.dtype), [note] if note else []


@contextmanager
def _reference(run: StageRun) -> Iterator[RunWorker | None]:
    """Runs jobs in the environment `reference`; None where it is not built, since a conversion alone does not need it."""
    python = run.config.toolchains.get("reference")
    toolchain = environments.ready(run.root, "reference", python=python, platform=run.device)
    with tempfile.TemporaryDirectory(prefix="quantline-architecture-") as scratch:

        def ask(job: dict[str, Any]) -> JobResult:
            assert toolchain is not None
            log = Path(scratch, "worker.log")
            return run_worker(toolchain, MODULE, job, log=log, threads=run.config.threads, label=LABEL)

        yield None if toolchain is None else ask


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
    if config.source.kind == KIND:
        with building(out) as partial:
            told = restore_float(source, partial)
        for line in [*(one.replace(str(partial), str(out)) for one in told), f"convert -> {out}"]:
            print(line, file=sys.stderr)
        return
    with building(out) as partial, _reference(run) as ask:
        proof = convert(source, partial, config.convert, kind=config.source.kind, serving=serving, run_worker=ask)
    notes = [f"  note: {warning}" for warning in [*run.warnings, *proof.warnings]]
    for line in [*proof.summary(), *notes, f"convert -> {out}"]:
        print(line, file=sys.stderr)
