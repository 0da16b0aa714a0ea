"""Restore a backup into a fresh clone, check every hash, and put the outputs into the workspace:

python -m stages.restore from=DIR [snapshot=NAME]

Nothing is changed if a part of the backup is missing or damaged.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from quantline.pipeline.command_line import Option
from stages import ROOT, command

OPTIONS = [
    Option("from", "DIR", "folder of the backup", required=True),
    Option("snapshot", "NAME", "one of DIR/snapshots; default the latest"),
]


def restore(arguments: dict[str, str | None]) -> int:
    from quantline.lifecycle.restore import restore as bring_back
    from stages.verify import verify

    restored = bring_back(ROOT, Path(str(arguments["from"])), name=arguments["snapshot"])
    print(f"{restored.snapshot}: {restored.objects} objects and {restored.files} files restored")
    for note in restored.notes:
        print(f"  note: {note}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet"], cwd=ROOT, check=False)
    return done.returncode or verify({})


if __name__ == "__main__":
    command(restore, OPTIONS, __doc__)
