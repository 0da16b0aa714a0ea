"""Bring a backup back into a fresh clone, check every hash, and put the outputs into the workspace:

python -m stages.restore from=DIR [snapshot=NAME]

The latest snapshot is taken where none is named. Nothing is changed where the backup is not whole.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stages import ROOT


def restore(words: dict[str, str | None]) -> int:
    from quantline.core.errors import UserError
    from quantline.lifecycle.restore import restore as bring_back
    from stages.verify import verify

    if not words["from"]:
        raise UserError("from: is not set; give the folder of the backup, from=DIR")
    restored = bring_back(ROOT, Path(words["from"]), name=words["snapshot"])
    print(f"{restored.snapshot}: {restored.objects} objects and {restored.files} files are back")
    for note in restored.notes:
        print(f"  note: {note}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet"], cwd=ROOT, check=False)
    return done.returncode or verify({})


if __name__ == "__main__":
    from quantline.pipeline.command_line import run_words

    run_words(restore, __doc__, {"from": None, "snapshot": None})
