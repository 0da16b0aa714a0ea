"""The common part of every stage: find the inputs, provide an output folder that appears complete or not at all, and
write the result.

Under DVC a stage runs from a frozen configuration and finds its inputs under artifacts/. A manual run writes to scratch/.
Its inputs are the outputs with the fingerprints that its configuration needs, in scratch/ or artifacts/. If an input is
missing, the error names the command that makes it.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import building, write_json
from quantline.pipeline.config import Config
from quantline.pipeline.hashing import hash_folder
from quantline.pipeline.identity import combined, identity, options_fingerprint, stage_fingerprint
from quantline.pipeline.inputs import (
    Wanted,
    advice,
    float_config,
    missing_inputs,
    output_with_fingerprint,
    pipeline_output,
)
from quantline.pipeline.linked import keep_output
from quantline.pipeline.names import baseline_of, model_of, own_name
from quantline.pipeline.paths import (
    MANUAL_HOME,
    PIPELINE_HOME,
    StagePaths,
    Taken,
    checked_name,
    manual_name,
    manual_paths,
    read_result,
    stage_paths,
)
from quantline.pipeline.stages import STAGES, is_baseline, refuse_source
from quantline.toolchains import environments, runner
from quantline.toolchains.protocol import JobResult, installed_versions
from quantline.toolchains.runner import Ask, early_worker
from quantline.toolchains.toolchain import Toolchain

RESULT_SCHEMA = 1
_CORE_VERSIONS = ("numpy", "safetensors", "transformers", "huggingface-hub", "dvc", "hydra-core")


@dataclass
class StageRun:
    """One run of one stage: its configuration, its paths and its results.

    A stage's function reads `config`, calls `input` and `output`, and fills `metrics`, `warnings` and `files` (small files
    of its output that are published with the metrics). `status` is `ok`, or `unsupported` with a `reason` if the serving
    target does not support the variant. A `detached` run makes an output outside of a variant and writes no result.
    """

    stage: str
    config: Config
    root: Path
    overrides: tuple[str, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    status: str = "ok"
    reason: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    detached: bool = False
    early: dict[str, Ask] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage != "convert":
            refuse_source(self.config, self.stage)

    @property
    def frozen(self) -> bool:
        """Whether this run is a part of the pipeline rather than a manual run."""
        return self.config.frozen is not None

    @property
    def home(self) -> Path:
        """artifacts/ or scratch/."""
        return self.root / (PIPELINE_HOME if self.frozen else MANUAL_HOME)

    @property
    def variant(self) -> str:
        """The variant's name, which is the name of its folder below artifacts/ or scratch/.

        Raises:
            UserError: it is not a valid name.
        """
        if self.config.frozen is None:
            return manual_name(self.config, self.overrides)
        name = self.config.frozen.variant
        for part in (model_of(name), "" if self.is_baseline else own_name(name)):
            if part:
                checked_name(part)
        return baseline_of(name) if self.is_baseline else name

    @property
    def paths(self) -> StagePaths:
        """Where this run's output goes."""
        if self.frozen:
            return stage_paths(self.home, self.variant, self.stage)
        return manual_paths(self.root, self.config, self.variant, self.stage)

    @property
    def device(self) -> str:
        """cpu or cuda; `auto` is resolved.

        Raises:
            UserError: cuda is asked for and this machine has none.
        """
        return environments.usable_platform(self.config.device)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of this run's output."""
        return stage_fingerprint(self.config, self.stage, self.root)

    def refuse_float(self) -> None:
        """Refuse the baseline in a stage that does not apply to it.

        Raises:
            UserError: the configuration has method=float.
        """
        if self.is_baseline:
            raise UserError(
                f"method=float: the baseline skips {self.stage}; choose method=awq, gptq, rtn, bnb or autoround"
            )

    def toolchain(self, name: str) -> Toolchain:
        """The named environment, ready to use."""
        return environments.ensure(self.root, name, python=self.config.toolchains.get(name), platform=self.device)

    def worker(
        self, toolchain: str, module: str, job: dict[str, Any], label: str, *, log: Path | None = None
    ) -> JobResult:
        """Run a worker and record its versions and peak memory; `log` defaults to the stage's log."""
        chosen = self.toolchain(toolchain)
        log = log or self.paths.log
        result = runner.run_worker(chosen, module, job, log=log, threads=self.config.threads, label=label)
        self.peak_memory_bytes = max(self.peak_memory_bytes, result.peak_memory_bytes)
        self.environment.update(toolchain=toolchain, lock_sha256=chosen.lock_sha256, versions=result.versions)
        return result

    def side_worker(self, toolchain: str, module: str, job: dict[str, Any], label: str) -> JobResult:
        """Run a worker that only measures the stage's output; it has its own log and is not recorded as the environment."""
        if ask := self.early.pop(module, None):
            return ask(job, label)
        chosen, log = self.toolchain(toolchain), self._side_log(module)
        return runner.run_worker(chosen, module, job, log=log, threads=self.config.threads, label=label)

    @contextmanager
    def early_side_worker(self, toolchain: str, module: str) -> Iterator[None]:
        """Start a side worker's interpreter now, so that its imports are finished when `side_worker` is called."""
        chosen, log = self.toolchain(toolchain), self._side_log(module)
        with early_worker(chosen, module, log=log, threads=self.config.threads) as self.early[module]:
            try:
                yield
            finally:
                self.early.pop(module, None)

    def _side_log(self, module: str) -> Path:
        return self.paths.log.with_name(f"{self.stage}.{module.rsplit('.', 1)[-1]}.log")

    def input(self, stage: str, *, baseline: bool = False) -> Path:
        """The output folder of an earlier stage, or of the baseline's.

        Raises:
            UserError: it is not there; the message names everything that is missing and the commands that make it. Or it
                lacks the file that this stage reads of it.
        """
        if self.frozen:
            path = pipeline_output(self.root, baseline_of(self.variant) if baseline else self.variant, stage)
        else:
            config = float_config(self.config) if baseline else self.config
            found = output_with_fingerprint(self.root, stage, stage_fingerprint(config, stage, self.root))
            if found is None:
                missing = missing_inputs(self.root, self.stage, Wanted(stage, baseline), self.config)
                raise UserError(advice(self.stage, missing, self.overrides))
            path = found
        takes = STAGES[self.stage].takes if self.stage in STAGES else {}
        took = Taken(stage, None if baseline else takes.get(stage), baseline)
        content = took.content(read_result(stage_paths_of(path).result))
        if content is None:
            raise UserError(f"{path.relative_to(self.root)}: its result does not have {took.file}; run {stage} again")
        self.inputs[str(took)] = content
        return path

    def input_file(self, stage: str) -> Path:
        """The one file that this stage reads of an earlier stage's output, as the table of stages says.

        Raises:
            UserError: the output is not there, see `input`.
        """
        return self.input(stage) / STAGES[self.stage].takes[stage]

    @property
    def is_baseline(self) -> bool:
        """Whether this is the float baseline."""
        return is_baseline(self.config)

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder from which a long run resumes after a crash; named by the fingerprint, removed after success."""
        folder = self.root / MANUAL_HOME / ".work" / self.fingerprint[:16]
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    @property
    def checkpoint_stage(self) -> str:
        """The stage whose output is served and evaluated."""
        return "download" if self.is_baseline else "convert"

    def checkpoint(self) -> Path:
        """The checkpoint to serve and evaluate: the converted one, or the float model."""
        folder = self.input(self.checkpoint_stage)
        return folder / "model" if self.checkpoint_stage == "download" else folder

    @contextmanager
    def output(self) -> Iterator[Path]:
        """An empty folder that becomes this stage's output if the block succeeds, and is removed if it fails.

        Errors of the block name the output, not the folder that is removed.
        """
        with building(self.paths.output) as folder:
            yield folder
            self.paths.result.unlink(missing_ok=True)  # it is of the former output

    def write_result(self, started_at: float) -> dict[str, Any]:
        """Hash the output and write the result; this is the last step."""
        hashes = hash_folder(self.paths.output)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        environment = {
            "device": self.device, "threads": self.config.threads, "toolchain": "core",
            "lock_sha256": environments.core_lock(self.root), "versions": installed_versions(_CORE_VERSIONS),
            **self.environment,
        }  # fmt: skip
        here = self.paths.output.relative_to(self.root).as_posix()
        result = {
            "schema": RESULT_SCHEMA, "stage": self.stage, "variant": self.variant, "fingerprint": self.fingerprint,
            "identity": identity(self.config, self.stage, self.root),
            "options": options_fingerprint(self.config, self.stage, self.root),
            "status": self.status, "reason": self.reason, "metrics": self.metrics, "inputs": self.inputs,
            "outputs": hashes.files, "output_hash": combined(hashes.files), "tensors": hashes.tensors,
            "timings": {"started_at": started_at, "total_seconds": time.time() - started_at},
            "peak_memory_bytes": max(own, self.peak_memory_bytes), "environment": environment,
            "warnings": self.warnings, "files": [f"{here}/{name}" for name in self.files], "tables": self.tables,
            "monitor": self.monitor,
        }  # fmt: skip
        write_json(self.paths.result, result)
        if self.frozen and (self.root / ".dvc").is_dir():
            keep_output(self.root, [self.paths.output, self.paths.result])
        return result


def stage_paths_of(output: Path) -> StagePaths:
    """The paths of an output folder."""
    return StagePaths(output)
