from __future__ import annotations

import os
import subprocess
import sys

import pytest


def quantline(root, *words):
    variables = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-m", "quantline.pipeline.console", *words]
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)


def test_the_overview_names_every_command_and_what_it_does(root):
    done = quantline(root)
    assert done.returncode == 0
    listed = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert set(listed) == {path.stem for path in (root / "stages").glob("[a-z]*.py")}
    assert all(
        len(line.split()) > 3 and "python -m" not in line for name, line in listed.items() if name != "completion"
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, "quantline 0."),
        (["quantise"], 2, "error: quantise: no such command (did you mean quantize?); `quantline help` lists them"),
        (["retention", "apply=yes"], 2, "error: apply=yes: allowed are false, true"),
        (["plan", "model=none"], 2, "error: model=none: allowed are custom, demo"),
    ],
)
def test_a_command_is_the_same_as_by_its_module(root, words, code, said):
    done = quantline(root, *words)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
