"""Back up the pipeline's outputs and measurements: DVC's objects, dvc.lock, params.yaml, MLflow's embedded store.

Only files that are new since earlier backups in the folder are copied. See docs/guide/storage.md.

Examples:
    python -m stages.backup to=/mnt/backup/quantline
"""

from __future__ import annotations

import sys
from pathlib import Path

from quantline.pipeline.command_line import Option
from stages import ROOT, command

SHOWN = 10
OPTIONS = [Option("to", "DIR", "folder of the backup; it may contain earlier ones", required=True)]


def backup(arguments: dict[str, str | None]) -> int:
    from quantline.lifecycle.backup import backup as save
    from quantline.lifecycle.backup import remove_stale
    from quantline.lifecycle.promoted import promoted

    to = Path(str(arguments["to"]))
    remove_stale(to)
    saved = save(ROOT, to, also=promoted(ROOT))
    print(f"{saved.snapshot}: {saved.objects} files, {saved.bytes / 1e6:.1f} MB, {saved.copied} of them new")
    if saved.left_out:
        shown = ", ".join(saved.left_out[:SHOWN]) + (" and others" if len(saved.left_out) > SHOWN else "")
        print(f"  note: git does not track {shown}, so they are not saved; `git add` what belongs to it",
              file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    command(backup, OPTIONS, __doc__)
