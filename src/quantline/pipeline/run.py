"""What every stage does around its work: find inputs, give an output folder that appears whole or not at all, write the
result.

Under DVC a stage runs from a frozen configuration and finds its inputs under artifacts/. By hand it writes to scratch/ and
takes as input whatever output carries the fingerprint that the configuration asks for, wherever it was made; where there
is none it says which command makes it.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.method import FloatMethod
from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.pipeline import identity as lineage
from quantline.pipeline.config import Config
from quantline.pipeline.hashing import hash_folder
from quantline.pipeline.paths import BASELINE, StagePaths, checked_name, derived_name, read_result, stage_paths
from quantline.quantization.requirements import wish_of
from quantline.toolchains import environments, runner
from quantline.toolchains import toolchain as toolchain_module
from quantline.toolchains.protocol import JobResult, installed_versions
from quantline.toolchains.runner import Ask, early_worker

if TYPE_CHECKING:
    from quantline.quantization.quantize import Request
    from quantline.serving.server import ServerOptions, Vllm

RESULT_SCHEMA = 1
_CORE_VERSIONS = ("numpy", "safetensors", "transformers", "huggingface-hub", "dvc", "hydra-core")


@dataclass
class StageRun:
    """One run of one stage: its configuration, its places, and what it will report.

    A stage's function reads `config`, calls `input` and `output`, and fills `metrics`, `warnings` and `files` (those of its
    output that are small and worth keeping beside the metrics). `status` is `ok` or, where the serving target cannot take
    the variant, `unsupported` with a `reason`. A `detached` run made something that is no part of a variant: no result is
    written of it.
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

    @property
    def frozen(self) -> bool:
        """Whether this run belongs to the pipeline rather than to somebody's hands."""
        return self.config.frozen is not None

    @property
    def home(self) -> Path:
        """artifacts/ or scratch/."""
        return self.root / ("artifacts" if self.frozen else "scratch")

    @property
    def variant(self) -> str:
        """The variant's name."""
        if self.config.frozen is not None:
            return checked_name(self.config.frozen.variant)
        return checked_name(self.config.variant or derived_name(self.config, self.overrides))

    @property
    def paths(self) -> StagePaths:
        """Where this run's output goes."""
        return stage_paths(self.home, self.variant, self.stage)

    @property
    def device(self) -> str:
        """cpu or cuda, `auto` resolved."""
        return environments.detect_platform() if self.config.device == "auto" else self.config.device

    @property
    def fingerprint(self) -> str:
        """What this run's output follows from."""
        return lineage.stage_fingerprint(self.config, self.stage, self.root)

    def refuse_float(self) -> None:
        """Refuse the baseline where a stage has nothing to do for it.

        Raises:
            UserError: the configuration has method=float.
        """
        if self.is_baseline:
            raise UserError(
                f"method=float: the baseline skips {self.stage}; choose method=awq, gptq, rtn, bnb or autoround"
            )

    def refuse_frozen(self) -> None:
        """Refuse a frozen configuration where a stage is no part of the pipeline.

        Raises:
            UserError: the configuration is frozen.
        """
        if self.frozen:
            raise UserError(f"{self.stage}: is run by hand, with overrides; leave -cp and -cn out")

    def toolchain(self, name: str) -> toolchain_module.Toolchain:
        """The named environment, ready to use."""
        return environments.ensure(self.root, name, python=self.config.toolchains.get(name), platform=self.device)

    def worker(
        self, toolchain: str, module: str, job: dict[str, Any], label: str, *, log: Path | None = None
    ) -> JobResult:
        """Run a worker and take over its versions and its peak memory; `log` is the stage's where it is not given."""
        chosen = self.toolchain(toolchain)
        log = log or self.paths.log
        result = runner.run_worker(chosen, module, job, log=log, threads=self.config.threads, label=label)
        self.peak_memory_bytes = max(self.peak_memory_bytes, result.peak_memory_bytes)
        self.environment.update(toolchain=toolchain, lock_sha256=chosen.lock_sha256, versions=result.versions)
        return result

    def side_worker(self, toolchain: str, module: str, job: dict[str, Any], label: str) -> JobResult:
        """Run a worker that only looks at what the stage made: with a log of its own, and not as the stage's environment."""
        if ask := self.early.pop(module, None):
            return ask(job, label)
        chosen, log = self.toolchain(toolchain), self._side_log(module)
        return runner.run_worker(chosen, module, job, log=log, threads=self.config.threads, label=label)

    @contextmanager
    def early_side_worker(self, toolchain: str, module: str) -> Iterator[None]:
        """Start the interpreter of a side worker now, so that its imports are done when `side_worker` is called."""
        chosen, log = self.toolchain(toolchain), self._side_log(module)
        with early_worker(chosen, module, log=log, threads=self.config.threads) as self.early[module]:
            try:
                yield
            finally:
                self.early.pop(module, None)

    def _side_log(self, module: str) -> Path:
        return self.paths.log.with_name(f"{self.stage}.{module.rsplit('.', 1)[-1].removesuffix('_worker')}.log")

    def input(self, stage: str, *, baseline: bool = False) -> Path:
        """The output folder of an earlier stage, or of the baseline's.

        Raises:
            UserError: it is not there; the message names the command that makes it.
        """
        config = float_config(self.config) if baseline else self.config
        path = self._pipeline_input(stage, baseline) if self.frozen else self._manual_input(stage, config, baseline)
        name = f"{BASELINE}/{stage}" if baseline else stage
        self.inputs[name] = str(read_result(stage_paths_of(path).result)["output_hash"])
        return path

    def _pipeline_input(self, stage: str, baseline: bool) -> Path:
        places = stage_paths(self.home, BASELINE if baseline else self.variant, stage)
        if not places.output.is_dir() or not places.result.is_file():
            raise UserError(f"{places.output.relative_to(self.root)} is missing: run `dvc repro`, which makes it first")
        return places.output

    def _manual_input(self, stage: str, config: Config, baseline: bool) -> Path:
        wanted = lineage.stage_fingerprint(config, stage, self.root)
        for home in ("scratch", "artifacts"):
            for result in sorted((self.root / home).glob(f"*/{stage}.json")):
                output = result.with_suffix("")
                if output.is_dir() and read_result(result).get("fingerprint") == wanted:
                    return output
        overrides = [
            part for part in self.overrides if not (baseline and part.startswith(("method", "bits", "group_size")))
        ]
        command = shlex.join(["python", "-m", f"stages.{stage}", *(["method=float"] if baseline else []), *overrides])
        raise UserError(
            f"{self.stage} needs the output of {stage}, which is not there for these options; run: {command}"
        )

    @property
    def is_baseline(self) -> bool:
        """Whether this is the float model itself."""
        return self.config.method.name == BASELINE

    def quantization_request(self) -> Request:
        """What the quantize stage is asked for."""
        from quantline.quantization.quantize import Request

        config = self.config
        return Request(
            method=config.method.model_dump(), bits=config.bits, group_size=config.group_size, backend=config.backend,
            order=lineage.backends_of(config), wish=wish_of(config.model_dump()),
            rules=config.layers.model_dump()["rules"], seed=config.seed, threads=config.threads, device=self.device,
        )  # fmt: skip

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder for what a long run keeps to go on from after a crash; known by the fingerprint, gone after success."""
        folder = self.root / "scratch" / ".work" / self.fingerprint[:16]
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)

    def server(self) -> Vllm:
        """Interpreter and version of the server's toolchain."""
        from quantline.serving.server import Vllm

        chosen = self.toolchain("vllm")
        version = environments.distribution_version(chosen, "vllm")
        self.environment.update(toolchain="vllm", lock_sha256=chosen.lock_sha256, versions={"vllm": version})
        return Vllm(chosen.python, version)

    def server_options(self, *, quantized: bool) -> ServerOptions:
        """How the server is started for a checkpoint."""
        from quantline.serving.rules import serving_dtype
        from quantline.serving.server import ServerOptions

        serve = self.config.serve
        return ServerOptions(
            serve.process, device=self.device, dtype=serving_dtype(serve.dtype, quantized=quantized),
            max_model_len=serve.max_model_len, enforce_eager=serve.enforce_eager,
            trust_remote_code=self.config.model.trust_remote_code,
        )  # fmt: skip

    @property
    def checkpoint_stage(self) -> str:
        """The stage whose output is served and judged."""
        return "download" if self.is_baseline else "convert"

    def checkpoint(self) -> Path:
        """The checkpoint to serve and judge: the converted one, or the float model itself."""
        folder = self.input(self.checkpoint_stage)
        return folder / "model" if self.checkpoint_stage == "download" else folder

    def changed_files(self) -> int:
        """How many files of the checkpoint's folder are not what its result recorded: changed, added or lost."""
        folder = self.input(self.checkpoint_stage)
        recorded = read_result(stage_paths_of(folder).result)["outputs"]
        return len(lineage.differing(recorded, lineage.file_hashes(folder)))

    @property
    def partial(self) -> Path:
        """Where this process makes its output."""
        return self.paths.output.with_name(f".{self.paths.output.name}.partial-{os.getpid()}")

    @contextmanager
    def output(self) -> Iterator[Path]:
        """An empty folder that becomes this stage's output when the block ends well, and vanishes when it does not."""
        places = self.paths
        places.output.parent.mkdir(parents=True, exist_ok=True)
        for stale in places.output.parent.glob(f".{places.output.name}.partial-*"):
            if not _alive(int(stale.name.rsplit("-", 1)[1])):
                shutil.rmtree(stale, ignore_errors=True)
        partial = self.partial
        try:
            partial.mkdir()
            yield partial
            places.result.unlink(missing_ok=True)
            if places.output.exists():
                shutil.rmtree(places.output)
            os.replace(partial, places.output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def write_result(self, started_at: float) -> dict[str, Any]:
        """Hash the output and write the result, last of all."""
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
            "identity": lineage.identity(self.config, self.stage, self.root),
            "options": lineage.options_fingerprint(self.config, self.stage, self.root),
            "status": self.status, "reason": self.reason, "metrics": self.metrics, "inputs": self.inputs,
            "outputs": hashes.files, "output_hash": lineage.combined(hashes.files), "tensors": hashes.tensors,
            "timings": {"started_at": started_at, "total_seconds": time.time() - started_at},
            "peak_memory_bytes": max(own, self.peak_memory_bytes), "environment": environment,
            "warnings": self.warnings, "files": [f"{here}/{name}" for name in self.files], "tables": self.tables,
            "monitor": self.monitor,
        }  # fmt: skip
        write_json(self.paths.result, result)
        return result


def stage_paths_of(output: Path) -> StagePaths:
    """The paths that go with an output folder."""
    return StagePaths(output)


def float_config(config: Config) -> Config:
    """The baseline's configuration: the same model, serving and evaluation, no method."""
    return config.model_copy(update={"method": FloatMethod(name="float")})


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
