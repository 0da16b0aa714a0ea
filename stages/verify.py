"""Check every file of the pipeline's outputs and of DVC's cache against dvc.lock and the results.

Lists damaged and missing files with their variant and the remedy; exits with 1 if there are any.

Examples:
    python -m stages.verify
"""

from __future__ import annotations

import sys

from stages import ROOT, command


def verify(_arguments: dict[str, str | None]) -> int:
    from quantline.core.errors import QuantlineError
    from quantline.lifecycle.promoted import promoted
    from quantline.lifecycle.retention import remove_partial
    from quantline.lifecycle.verify import verify as check
    from quantline.pipeline.dvc_config import cache_folder

    for line in remove_partial(ROOT):
        print(line)
    try:
        kept = promoted(ROOT)
    except QuantlineError as error:
        print(f"  note: what promoted variants need is not known: {error}", file=sys.stderr)
        kept = {}
    report = check(ROOT, cache_folder(ROOT), kept)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    checked = (
        f"{report.files} files of the workspace, {report.objects} objects of the cache ({report.bytes / 1e6:.1f} MB)"
    )
    print(f"{checked}: {len(report.faults)} faults" if report.faults else f"{checked}: all match dvc.lock")
    return 1 if report.faults else 0


if __name__ == "__main__":
    command(verify, about=__doc__)
