"""A DVC project in git whose stage writes two small files and a result, for tests of what keeps and moves outputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PIPELINE = """\
stages:
  quantize:
    foreach: ${variants}
    do:
      cmd: python make.py ${key} ${item}
      deps: [make.py]
      outs: ["artifacts/${key}/quantize", "artifacts/${key}/quantize.json"]
"""
MAKE = """\
import json, sys
from pathlib import Path
from quantline.pipeline.identity import combined, file_hashes
out = Path("artifacts", sys.argv[1], "quantize")
out.mkdir(parents=True)
(out / "config.json").write_text(json.dumps({"bits": 4}))
(out / "model.safetensors").write_text(sys.argv[2] * 1000)
hashes = file_hashes(out)
result = {"stage": "quantize", "outputs": hashes, "output_hash": combined(hashes), "inputs": {}}
out.with_name("quantize.json").write_text(json.dumps(result))
"""


@dataclass(frozen=True)
class Project:
    """The project's folder, and the source that its stage imports."""

    root: Path
    source: Path

    @property
    def cache(self) -> Path:
        return self.root / ".dvc" / "cache"

    def run(self, *command: str, code: int | None = 0, **variables: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "GIT_", "AWS_"))}
        kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        kept.update(PYTHONPATH=str(self.source), DVC_NO_ANALYTICS="1", **variables)
        done = subprocess.run(command, cwd=self.root, env=kept, capture_output=True, text=True, check=False)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def dvc(self, *arguments: str, **options: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, **options)

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@localhost", "-c", "commit.gpgsign=false"]
        return self.run("git", *identity, *arguments)

    def variants(self, **lines: str) -> None:
        text = "".join(f"  {name}: {line}\n" for name, line in lines.items())
        (self.root / "params.yaml").write_text(f"variants:\n{text}")

    def copy(self, target: Path) -> Project:
        shutil.copytree(self.root, target, symlinks=True)
        return Project(target, self.source)

    def clone(self, target: Path) -> Project:
        """As on another machine: what git has, and a cache of its own."""
        self.run("git", "clone", "-q", str(self.root), str(target))
        return Project(target, self.source)

    def content(self) -> dict[str, bytes]:
        """The outputs in the workspace."""
        folder = self.root / "artifacts"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(checkout: Path, target: Path) -> Project:
    target.mkdir(parents=True)
    project = Project(target, checkout / "src")
    (target / "dvc.yaml").write_text(PIPELINE)
    (target / "make.py").write_text(MAKE)
    (target / ".gitignore").write_text("/artifacts/\n/mlflow.db\n/mlartifacts/\n*.tmp\n")
    project.variants(one="a", two="b")
    project.git("init", "-q")
    project.dvc("init", "-q")
    shutil.copyfile(checkout / ".dvc" / "config", target / ".dvc" / "config")
    project.dvc("repro", "-q")
    project.git("add", "-A")
    project.git("commit", "-q", "-m", "built")
    return project
