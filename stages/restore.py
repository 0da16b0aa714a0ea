"""Restore a backup into a fresh clone, check every hash, and put the outputs into the workspace.

Nothing is changed if a part of the backup is missing or damaged.

Examples:
    python -m stages.restore from=/mnt/backup/quantline
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
    from quantline.core.errors import QuantlineError
    from quantline.lifecycle.restore import restore as bring_back
    from quantline.lifecycle.storage.dvc_lock import read_lock
    from stages.verify import verify

    restored = bring_back(ROOT, Path(str(arguments["from"])), name=arguments["snapshot"])
    print(f"{restored.snapshot}: {restored.objects} objects and {restored.files} files restored")
    for note in restored.notes:
        print(f"  note: {note}", file=sys.stderr)
    made = sorted({output.stage for output in read_lock(ROOT)})  # dvc fails for a variant that was not run yet
    command = [sys.executable, "-m", "dvc", "checkout", *made]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise QuantlineError(
            f"the outputs are in DVC's cache, but `dvc checkout` failed:\n{(done.stdout + done.stderr).strip()}\n"
            "Correct that; `python -m stages.verify` then lists what is missing, with the command that brings it"
        )
    return verify({})


if __name__ == "__main__":
    command(restore, OPTIONS, __doc__)
