"""A copy of the checkout in which stages and the pipeline run for real, without a trace in the checkout itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# What every variant of the tests starts from: little text, so that the pipeline takes minutes.
SHARED = [
    "model=demo", "calibration=demo", "calibration.n_samples=4", "calibration.seq_len=256", "evaluate.max_tokens=6000",
    "evaluate.max_document_tokens=256", "evaluate.bootstrap.resamples=500", "serve.smoke.max_tokens=12",
    "evaluate.generations.prompts=4", "evaluate.generations.new_tokens=8", "evaluate.restore.layers=1",
    "evaluate.restore.tokens=1000", "serve.process.kv_cache_gib=0.25", "tasks=none", "speed=none",
]  # fmt: skip
VARIANTS = {
    "awq-w4-g128": "method=awq bits=4 group_size=128",
    "gptq-w4-g128": "method=gptq bits=4 group_size=128",
    "gptq-w8-g128": "method=gptq bits=8 group_size=128",
}
# Secrets in the environment of the whole pipeline. Nothing that it writes may contain them.
PLANTED = {
    "HF_TOKEN": "hf_plantedHubToken4711", "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-4711",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4711", "MLFLOW_TRACKING_TOKEN": "planted-bearer-4711",
}  # fmt: skip
_DROPPED = ("MLFLOW_", "DVC_", "PYTEST_", "HF_", "PYTHON", "GIT_")

# In the environment of the whole pipeline, and to be found in nothing that it writes.
PLANTED = {
    "HF_TOKEN": "hf_plantedHubToken4711", "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-4711",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4711", "MLFLOW_TRACKING_TOKEN": "planted-bearer-4711",
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"


@dataclass(frozen=True)
class Checkout:
    """The copy."""

    root: Path

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
        kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
        kept.update(DVC_NO_ANALYTICS="1", HF_HUB_OFFLINE="1", TMPDIR=str(self.temporary))
        return kept

    @property
    def temporary(self) -> Path:
        folder = self.root.parent / "tmp"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own, as a terminal does."""
        return subprocess.Popen(
            command, cwd=self.root, env={**self.environment(), **variables}, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *command: str, **variables: str) -> Done:
        process = self.start(*command, **variables)
        try:
            out, err = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            raise
        return Done(process.returncode, out, err)

    def dvc(self, *arguments: str) -> Done:
        return self.run("python", "-m", "dvc", *arguments)

    def stage(self, name: str, *overrides: str, **variables: str) -> Done:
        """Run a stage by hand, from the shared options and `overrides`, without tracking."""
        return self.run(*self.stage_command(name, *overrides), **variables)

    def stage_command(self, name: str, *overrides: str) -> list[str]:
        given = {override.partition("=")[0] for override in overrides}
        shared = [override for override in SHARED if override.partition("=")[0] not in given]
        return ["python", "-m", f"stages.{name}", *shared, "tracking.enabled=false", *overrides]

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@localhost", "-c", "commit.gpgsign=false"]
        done = self.run("git", *identity, *arguments)
        assert done.code == 0, done.text
        return done.out

    def result(self, variant: str, stage: str, home: str = "artifacts") -> dict[str, Any]:
        return json.loads((self.root / home / variant / f"{stage}.json").read_text(encoding="utf-8"))

    def write_params(self, variants: dict[str, str]) -> None:
        lines = [f"shared: {' '.join(SHARED)}", "baseline: method=float", "variants:"]
        lines += [f"  {name}: {line}" for name, line in variants.items()]
        (self.root / "params.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def processes(self) -> list[psutil.Process]:
        """Living processes that work in the copy, or were started with a path of it."""
        mark, found = str(self.root.parent), []
        for process in psutil.process_iter():
            try:
                places = [process.cwd(), *process.cmdline(), process.environ().get("TMPDIR", "")]
                ended = process.status() == psutil.STATUS_ZOMBIE
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if process.pid != os.getpid() and not ended and any(mark in place for place in places):
                found.append(process)
        return found

    def staying(self, seconds: float = 10) -> list[list[str]]:
        """Commands of processes that do not end by themselves; one that was just being started ends a moment later."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            psutil.wait_procs(self.processes(), timeout=1)
        return [process.cmdline() for process in self.processes()]

    def leftovers(self) -> list[str]:
        """Half-written outputs, and temporary files of workers and servers."""
        halves = [path for home in ("scratch", "artifacts", "variants") for path in (self.root / home).rglob("*")
                  if ".partial-" in path.name or path.suffix == ".tmp"]  # fmt: skip
        return [str(path) for path in [*halves, *self.temporary.glob("quantline-*")]]

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file under scratch/, artifacts/ and variants/, logs aside."""
        return {
            path.relative_to(self.root).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
            for home in ("scratch", "artifacts", "variants")
            for path in sorted((self.root / home).rglob("*"))
            if path.is_file() and path.suffix != ".log"
        }


def copy_checkout(root: Path, target: Path) -> Checkout:
    """Copy what git tracks or would track, make it a repository, share the environments."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    )
    for name in sorted(set(listed.stdout.decode().split("\0"))):
        if name and name != "dvc.lock" and (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    (target / ".venvs").mkdir()
    for folder in (root / ".venvs").iterdir():
        if folder.is_dir():
            (target / ".venvs" / folder.name).symlink_to(folder)
    copy = Checkout(target)
    copy.write_params(VARIANTS)
    copy.git("init", "-q")
    copy.git("add", "-A")
    copy.git("commit", "-q", "-m", "copy")
    return copy


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Return when `condition` holds; fail where the process ends or time runs out before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"it ended before: {process.communicate()}")
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.002)
