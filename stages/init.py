"""Start a project in a new folder: conf/, params.yaml, dvc.yaml, the locks of the environments, and the demo model.

With model=PATH the project is about that model instead of the demo.

Examples:
    python -m stages.init to=project
    python -m stages.init to=project model=models/mine calibration=chats.jsonl
    python -m stages.init to=project model=models/mine goal=gpu24
"""

from __future__ import annotations

import shutil
from pathlib import Path

from quantline.pipeline.command_line import Option
from stages import command

OPTIONS = [
    Option("to", "DIR", "the folder; a new one, or an empty one", required=True),
    Option("model", "PATH", "folder of a float model; or owner/name@COMMIT on the Hugging Face hub"),
    Option("goal", "gpu24", "variants for what serves them: gpu24, gpu80, cpu or edge; each line says why it is there"),
    Option("calibration", "FILE", "text like that which the model will meet, for methods that calibrate: .jsonl, .txt"),
]


def init(arguments: dict[str, str | None]) -> None:
    from quantline.lifecycle.project import create

    to = Path(str(arguments["to"])).expanduser().absolute()
    create(to, model=arguments["model"], calibration=arguments["calibration"], goal=arguments["goal"])
    here = [] if to.resolve() == Path.cwd().resolve() else [f"cd {to}"]
    lines = [*here, "quantline doctor", "quantline check && dvc repro"]
    if shutil.which("quantline") is None:
        lines.insert(0, f"pip install {Path(__file__).resolve().parents[1]}")
    print("\n  ".join([f"{to}: a new project; go on with", *lines]))


if __name__ == "__main__":
    command(init, OPTIONS, __doc__)
