"""Questions in a row to a variant by its own library, without a server: answers, seconds and memory as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantline.core.errors import ConfigError
from quantline.core.files import write_json
from quantline.evaluation.speed.own_library import WORKER, Asking, asked, faults_of, job_of
from quantline.lifecycle.serve import Subject
from quantline.pipeline.paths import MANUAL_HOME
from quantline.pipeline.run import StageRun
from quantline.serving.rules import checkpoint_facts
from quantline.toolchains import runner


def ask(root: Path, run: StageRun, subject: Subject, asking: Asking, out: Path | None) -> tuple[dict[str, Any], Path]:
    """Ask the questions.

    Args:
        root: the checkout.
        run: for its environments and device.
        subject: the checkpoint.
        asking: the questions, and how.
        out: the file that gets the result; None is one below scratch/.

    Returns:
        The worker's result with what was asked for, and the file that has it.

    Raises:
        ConfigError: options exclude each other, or do not fit the checkpoint or the machine; all of them at once.
        WorkerError: the library failed.
    """
    method = checkpoint_facts(subject.folder).method
    if faults := faults_of(asking, method, run.device):
        raise ConfigError(faults)
    home = root / MANUAL_HOME / ".ask"
    environment, job = job_of(subject.folder, method, run.device, run.config.threads, asking)
    done = runner.run_worker(
        run.toolchain(environment), WORKER, job, log=home / f"{subject.name.replace('/', '-')}.log",
        threads=run.config.threads, label=f"asking {subject.name} by {job['library']}",
    )  # fmt: skip
    path = out or home / f"{subject.name.replace('/', '-')}.json"
    result = asked(environment, job, done)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"variant": subject.name, **result})
    return result, path
