"""Pack everything that a machine without a network needs: repository, environments, outputs.

There: `git clone DIR/repository.bundle quantline`, then `make setup BUNDLE=DIR`. See docs/guide/offline.md.

Examples:
    python -m stages.bundle to=/mnt/disk/quantline
    python -m stages.bundle to=/mnt/disk/quantline platform=cuda environments=reference,vllm outputs=false
"""

from __future__ import annotations

from pathlib import Path

from quantline.pipeline.command_line import Option
from stages import ROOT, command

OPTIONS = [
    Option("to", "DIR", "a new folder, on a disk that travels", required=True),
    Option("environments", "A,B", "the toolchains to pack, built first where they are not", "all"),
    Option("platform", "auto", "of the other machine; auto is this one's", allowed=("auto", "cpu", "cuda")),
    Option("outputs", "true", "also DVC's outputs and run cache: models, token ids, results", allowed=("true", "false")),
]  # fmt: skip


def bundle(arguments: dict[str, str | None]) -> int:
    from quantline.lifecycle.bundle import bundle as pack

    names = [name for name in str(arguments["environments"]).split(",") if name]
    to = Path(str(arguments["to"])).expanduser().absolute()
    made = pack(ROOT, to, names, on=str(arguments["platform"]), outputs=arguments["outputs"] == "true")
    print(f"{made.folder}: {made.bytes / 1e9:.1f} GB; environments {', '.join(made.environments)}")
    print(
        f"there: git clone {made.folder}/repository.bundle quantline && cd quantline && make setup BUNDLE={made.folder}"
    )
    return 0


if __name__ == "__main__":
    command(bundle, OPTIONS, __doc__)
