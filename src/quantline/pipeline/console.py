"""The console command: `quantline plan method=gptq` is `python -m stages.plan method=gptq`.

In a checkout both work. An installed package has the console command, in any folder that `quantline init` made.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import shutil
import sys
import textwrap
from pathlib import Path

from quantline import __version__
from quantline.core.text import nearest

# The order in which a newcomer needs them; what is not here follows by name.
_FIRST = (
    "init", "doctor", "plan", "check", "download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate", "tasks",
    "speed", "report", "publish", "ui",
)  # fmt: skip
_WIDTH = 110


def main() -> int:
    """Run the command that the first word names; returns the exit code."""
    folder = _commands()
    if folder is None:
        print("error: the package `stages` is not installed beside this one; install Quantline again", file=sys.stderr)
        return 1
    known = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"quantline {__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(_overview(folder, known))
        return 0
    if name not in known:
        print(f"error: {name}: no such command{nearest(name, known)}; `quantline help` lists them", file=sys.stderr)
        return 2
    os.environ["PYTHONSAFEPATH"] = "1"  # a folder named stages in the current one is somebody else's
    sys.argv[:2] = ["quantline"]
    runpy.run_module(f"stages.{name}", run_name="__main__")
    return 0


def _commands() -> Path | None:
    """The folder of the commands: beside this package's sources in a checkout, else the installed one."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parents[1] if package.parent.name == "src" else package.parent
    if (beside / "stages").is_dir():
        sys.path.insert(0, str(beside))
    found = importlib.util.find_spec("stages")
    return Path(found.origin).parent if found is not None and found.origin else None


def _overview(folder: Path, known: list[str]) -> str:
    ordered = [name for name in _FIRST if name in known] + [name for name in known if name not in _FIRST]
    lines = [
        f"quantline {__version__}: quantized variants of a language model, proven, served, measured and reproducible",
        "",
    ]
    lines += ["usage: quantline COMMAND [NAME=VALUE ...]", ""]
    width = min(_WIDTH, max(60, shutil.get_terminal_size((100, 24)).columns))
    for name in ordered:
        about = (ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or "").split("\n")[0]
        lines.append(f"  {name:<13} {textwrap.shorten(about.rstrip(':.'), width - 16, placeholder=' ...')}")
    return "\n".join(
        [*lines, "", "`quantline COMMAND --help` tells what a command reads. The whole pipeline: `dvc repro`."]
    )


if __name__ == "__main__":
    sys.exit(main())
