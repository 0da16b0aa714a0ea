"""Save what the pipeline made and measured: DVC's objects, dvc.lock, params.yaml, MLflow's embedded store:

python -m stages.backup to=DIR

DIR may hold earlier backups; only what is new is copied. See docs/guide/storage.md.
"""

from __future__ import annotations

from pathlib import Path

from stages import ROOT


def backup(words: dict[str, str | None]) -> int:
    from quantline.core.errors import UserError
    from quantline.lifecycle.backup import backup as save
    from quantline.lifecycle.backup import remove_stale
    from quantline.lifecycle.retention import promoted

    if not words["to"]:
        raise UserError("to: is not set; give the folder of the backup, to=DIR")
    to = Path(words["to"])
    remove_stale(to)
    saved = save(ROOT, to, also=promoted(ROOT))
    print(f"{saved.snapshot}: {saved.objects} files, {saved.bytes / 1e6:.1f} MB, {saved.copied} of them new")
    return 0


if __name__ == "__main__":
    from quantline.pipeline.command_line import run_words

    run_words(backup, __doc__, {"to": None})
